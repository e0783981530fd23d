"""The process that a job lives in: it holds the job's lock, and keeps its ranks going to their end.

It is forked from `syncbn.train.launch.server`, which has loaded torch already, or started by a
batch system with `syncbn.train.launch.batch`. It sleeps until a rank ends or it is told something:

- a rank that is killed is the end of the others at once, as they cannot finish their step;
- one that fails has the others told to stop, for they may know more;
- one that has done its part is followed by the others, or they hang: they are killed;
- up to `launch.max_restarts` times the ranks then go on from the newest checkpoint, unless they
  would fail again for certain;
- told to stop, it has the ranks write their state, within `launch.stop_timeout_s`.
"""

import itertools
import math
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from types import FrameType

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.launch.ranks import HANDLED, End, Ranks
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.lock import RunLock
from syncbn.train.run.reasons import CONFIG, RANK_FAILED, RETRIED, reason_of
from syncbn.train.schema import LaunchConfig, TrainConfig

# What ranks may take, when told to stop, beyond the time after which they end themselves.
_GRACE_S = 5


def supervise(
    run: RunDirectory,
    lock: RunLock,
    launcher: socket.socket | None = None,
    config: TrainConfig | None = None,
) -> int:
    """Bring a run to its end, write how it ended, and return the exit code.

    To be called in the main thread of a process that has no other thread.

    Args:
        run: the run's directory, with its configuration.
        lock: of the directory; each rank gets a part in it.
        launcher: a connection of which the other end stops the job by closing it, in whatever way.
        config: the run's; None: it is read.

    Returns:
        0 if the run is finished, 1 if it failed, 2 if its configuration is wrong, and 128 + a
        signal's number if that stopped it.
    """
    events = _Events(launcher)
    if _is_finished(run):
        return 0
    try:
        config = run.read_config() if config is None else config
        run.begin_attempt(config.epochs)
        code, failure = _keep_going(config, run, lock, events)
    except (SyncBNError, OSError) as error:  # such as no more processes
        _say(str(error))
        wrong = isinstance(error, ConfigError)
        return _end(run, _failed(str(error), reason_of(error), 2 if wrong else 1))
    result = run.read_result()
    if events.told:
        if result is None:
            _end(run, Result("interrupted", events.describe(failure), {}, 0, 128 + events.told))
        return 128 + events.told
    if result is not None and (failure is None or result.status != "interrupted"):
        return result.exit_code  # rank 0 knows more
    if failure is not None:
        return _end(run, _failed(failure.describe(), failure.reason))
    why = f"the ranks ended with exit code {code} and left no word"
    return _end(run, _failed(why, CONFIG if code == 2 else RANK_FAILED, code or 1))


def _keep_going(
    config: TrainConfig, run: RunDirectory, lock: RunLock, events: "_Events"
) -> tuple[int, End | None]:
    """Start the ranks until they end without a failure, or too often; return how they ended.

    Returns:
        The highest exit code of a rank that ended in order, and the failure that ended the others.
    """
    limit = config.launch.max_restarts
    for restart in itertools.count():
        if events.told:
            break
        ranks = Ranks(config, run, lock, restart)
        try:
            code, failure = _attend(ranks, events, config.launch)
        finally:
            ranks.close()
        if failure is None or events.told or _is_finished(run):
            return code, failure
        if restart == limit or failure.reason not in RETRIED:
            _say(failure.describe())
            return code, failure
        _say(f"{failure.describe()}; all ranks start again ({restart + 1} of {limit})")
        run.result_file.unlink(missing_ok=True)  # by which rank 0 said why it failed
        run.note_restart()
    return 0, None


def _attend(ranks: Ranks, events: "_Events", launch: LaunchConfig) -> tuple[int, End | None]:
    """Wait until all ranks have ended; return what `_keep_going` does."""
    code, failure, passed_on, deadline = 0, None, False, math.inf
    latest_s = launch.stop_timeout_s + _GRACE_S
    # The last thing that they do together is over when one ends. What follows is rank 0's alone,
    # and it ends itself after twice its time, unless it was stopped and cannot.
    alone_s = 2 * launch.timeout_s + _GRACE_S
    while ranks.pids:
        if events.told and not passed_on:
            passed_on, deadline = True, min(deadline, time.monotonic() + latest_s)
            ranks.tell(events.told)
        for end in ranks.reap():
            if end.is_orderly:
                code = max(code, end.code)
                deadline = min(deadline, time.monotonic() + alone_s)
            elif failure is None:
                failure = end
                if end.code < 0 and end.code != -events.told:
                    ranks.kill()
                else:
                    deadline = min(deadline, time.monotonic() + latest_s)
                    ranks.tell(signal.SIGTERM)
        if ranks.pids and time.monotonic() > deadline:
            if failure is None and not events.told:
                failure = ranks.give_up(alone_s)
            ranks.kill()
        if ranks.pids:
            events.wait(deadline)
    return code, failure


class _Events:
    """What a supervisor waits for: signals, deaths among them, and the end of its launcher.

    Args:
        launcher: a connection whose end is taken for SIGTERM.

    Attributes:
        told: the number of the first signal that told this process to stop; 0: none did.
    """

    def __init__(self, launcher: socket.socket | None) -> None:
        self.told = 0
        self._launcher = launcher
        self._poll = select.poll()
        self._signals, wakeup = os.pipe()
        for end in (self._signals, wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in HANDLED:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)  # if one came before, it is told now
        self._poll.register(self._signals, select.POLLIN)
        if launcher is not None:
            self._poll.register(launcher, select.POLLIN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:  # which is heard of by the pipe alone
            self.told = self.told or number

    def wait(self, deadline: float) -> None:
        """Return at the next event, or at a deadline."""
        left_s = max(0.0, deadline - time.monotonic())
        for descriptor, _ in self._poll.poll(None if left_s == math.inf else left_s * 1000 + 1):
            if descriptor == self._signals:
                os.read(self._signals, 1 << 12)
            elif self._launcher is not None:
                self._poll.unregister(self._launcher)
                self.told = self.told or signal.SIGTERM

    def describe(self, failure: End | None) -> str:
        """Return why a run was interrupted of which no rank says it."""
        name = signal.Signals(self.told).name
        if failure is not None and failure.code != -self.told:
            return f"stopped by {name}; {failure.describe()}"
        return f"stopped by {name} before the first step"


def _end(run: RunDirectory, result: Result) -> int:
    """Write how a run ended, where that is possible, and return the exit code."""
    try:
        run.write_result(result)
    except OSError as error:
        _say(f"cannot write {run.result_file}: {error.strerror}")
    return result.exit_code


def _is_finished(run: RunDirectory) -> bool:
    result = run.read_result()
    return result is not None and result.status == "finished"


def _failed(why: str, reason: str, exit_code: int = 1) -> Result:
    return Result("failed", why, {}, 0, exit_code, reason=reason)


def _say(text: str) -> None:
    with suppress(OSError):  # the disk may be full that the console is on, and the job goes on
        print(f"syncbn-train: {text}", file=sys.stderr, flush=True)
