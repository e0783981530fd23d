"""An end for what hangs: each rank says where it is, hears signals, and ends itself in time."""

import faulthandler
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import (
    Store,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.errors import SyncBNError, TrainingError
from syncbn.train.run.reasons import RANK_HUNG

log = logging.getLogger(__name__)

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
HUNG_CODE = 75
"""With which a rank ends itself that hangs, so that who started it knows."""
WATCHED = "watch"
"""Begins the keys of a watch in the ranks' store."""
ENDED = "ended"
"""Begins a key of the store, with the number of a rank that another has killed, which says why."""
_BEAT_S = 1.0
_ANSWER_S = 3 * _BEAT_S
_STORE_TIMEOUT = timedelta(seconds=5)
# How long asking who is missing may take: twice _ANSWER_S, and a store that is slow.
_BLAME_S = 2 * _ANSWER_S + _STORE_TIMEOUT.total_seconds()
# How often a rank asks whether the others have finished what takes long.
_POLL_S = 0.05


class _Place(NamedTuple):
    """Where a rank is: the step, what it does, since when, and how long that may take."""

    step: int
    doing: str
    since: float
    limit_s: float


class Watch:
    """Watches this rank from a thread of its own, and tells the others where it is from another.

    Two, because a store whose machine cannot be reached any more leaves its callers hanging until
    the kernel gives the connection up, which takes a quarter of an hour (torch 2.14's time-outs
    are for keys that do not come, and not for answers that do not).

    It ends the process if a signal to stop is not followed within `stop_timeout_s`, if the rank has
    not moved for twice `timeout_s` (the others' waits end after one), or if the process that
    started it is gone and it did not stop.

    Long work says that it moves, from the thread that does it, and never from another, which would
    go on while the work hangs:

    - what consists of parts, with `moving`: each part may take as long as a step;
    - what does not, as reading a large file in one call, with `working`: all of it may take
      `load_timeout_s`, and the other ranks wait as long.

    A rank that is told to stop tells the others, which hear of it within two seconds, whatever they
    do: an evaluation would otherwise go on on those whose machine was not told.

    Communicates: two small values to and from the store each second.

    Args:
        store: a connection to the ranks' store that nothing else uses.
        rank: this rank.
        world_size: how many there are.
        timeout_s: how long ranks wait for each other.
        stop_timeout_s: how long stopping may take.
        load_timeout_s: how long work without parts may take.

    Attributes:
        stop_signal: the number of the signal that told this rank or another to stop; 0: none did.
        is_told: whether it was this rank.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        stop_timeout_s: float,
        load_timeout_s: float = 1800,
    ) -> None:
        self.stop_signal = 0
        self.is_told = False
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._load_timeout_s = load_timeout_s
        self._works = 0
        self._stopped: dict[int, dict[str, Any]] = {}
        self._parent = os.getppid()
        self._told_at = 0.0
        self._beats = 0
        self._place = _Place(0, "starting", time.monotonic(), 2 * timeout_s)
        self._ended = threading.Event()
        self._answered_at = time.monotonic()  # the store, to this rank
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="tell", daemon=True)

    def start(self) -> None:
        """Begin to tell where this rank is, and to end it where it hangs."""
        store_timeout = getattr(self._store, "set_timeout", None)
        if store_timeout is not None:
            store_timeout(_STORE_TIMEOUT)
        self._answered_at = time.monotonic()
        self._thread.start()
        self._teller.start()

    def heed_signals(self) -> None:
        """Note the signals SIGTERM and SIGINT from now on instead of ending by them.

        Not before the ranks have found each other: there is nothing to lose yet, and Python hears
        of no signal while it waits in torch for a rank that does not come.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def end(self) -> None:
        """Stop watching, and let signals end the process again."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._ended.set()
        self._thread.join()
        self._teller.join(_ANSWER_S)

    def at(self, step: int, doing: str) -> None:
        """Note that this rank moves: which step, and what it does now."""
        self._place = _Place(step, doing, time.monotonic(), 2 * self._timeout_s)

    def moving(self, parts: Iterable[T], step: int, doing: str) -> Iterator[T]:
        """Yield the parts of long work, and note with each that this rank moves.

        Args:
            parts: what is worked on; each may take as long as a step, to get and to work on.
            step: where the rank is.
            doing: what it does, such as "evaluating".
        """
        self.at(step, doing)
        for part in parts:
            self.at(step, doing)
            yield part
            self.at(step, doing)
        self.at(step, "waiting for the other ranks")

    @contextmanager
    def working(self, step: int, doing: str) -> Generator[None]:
        """Do long work that has no parts, and end it together with the other ranks.

        It may take `load_timeout_s`. The ranks wait for each other at its end, through the store,
        as their waits in the process group would end after `timeout_s`. So all ranks enter it.

        Args:
            step: where the rank is.
            doing: what it does, such as "loading data".

        Raises:
            TrainingError: another rank did not come to the end in time.
        """
        self._works += 1
        done = f"done/{self._works}"
        self._place = _Place(step, doing, time.monotonic(), self._load_timeout_s)
        try:
            yield
        except SyncBNError:  # of which the ranks tell each other next
            self._meet(done, step, doing)
            raise
        except BaseException:
            self._store.set(f"{done}/{self._rank}", "")  # the others shall find out, and not wait
            raise
        self._meet(done, step, doing)

    def _meet(self, done: str, step: int, doing: str) -> None:
        """Return when all ranks have finished what they do."""
        self._store.set(f"{done}/{self._rank}", "")
        deadline = time.monotonic() + self._load_timeout_s
        missing = list(range(self._world_size))
        while missing := [r for r in missing if not self._store.check([f"{done}/{r}"])]:
            self.at(step, f"waiting for ranks that are {doing}")
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"ranks {missing} are still {doing}, {self._load_timeout_s:g} s after rank "
                    f"{self._rank} has finished; give them a longer launch.load_timeout_s"
                ).because(RANK_HUNG)
            time.sleep(_POLL_S)
        self.at(step, f"done with {doing}")

    def blame(self) -> str:
        """Return which ranks others wait for in vain, after one of their waits has ended.

        A rank that fails calls this, so who does not is gone or hangs. Ranks that hang print the
        stacks of their threads and end; of those that cannot, see `end_stopped`. Takes six seconds,
        or as long as nobody stops this rank: who started the ranks does, where it knows better.
        Returns "" where all ranks failed alike.
        """
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), name="ask", daemon=True)
        asking.start()
        begun = time.monotonic()
        while not found and asking.is_alive() and time.monotonic() < begun + _BLAME_S:
            self.at(self._place.step, "asking who is missing")  # which may outlast a short time-out
            asking.join(0.05)
            silent_s = time.monotonic() - self._answered_at
            # Two beats later, as this process may itself have been what stood still.
            if time.monotonic() > begun + 2 * _BEAT_S and silent_s > _STORE_TIMEOUT.total_seconds():
                return (
                    f"the ranks' store, which is with rank 0, has not answered for {silent_s:.0f} "
                    "s: that machine, or the network to it, is gone"
                )
        return found[0] if found else "the ranks' store answers too slowly to tell who is missing"

    def _ask(self) -> str:
        """Return what `blame` does, however long the store takes."""
        try:
            self._store.set(f"failed/{self._rank}", "")
            self._give_time()
            hanging = [
                rank
                for rank in range(self._world_size)
                if not self._store.check([f"failed/{rank}"])
            ]
            if not hanging or self.is_told:
                return ""
            before = {rank: self._last_beat(rank) for rank in hanging}
            for rank in hanging:
                self._store.set(f"stack/{rank}", "")
            self._give_time()
            after = {rank: self._last_beat(rank) for rank in hanging}
            self._stopped = {
                rank: after[rank]
                for rank in hanging
                if before[rank] == after[rank]
                and self._is_first_on(after[rank].get("host"), hanging)
            }
            return "; ".join(_describe(rank, before[rank], after[rank]) for rank in hanging)
        except Exception as error:  # the store may be what is gone
            return f"the ranks' store does not answer either: {error}"

    def _is_first_on(self, host: str | None, hanging: Sequence[int]) -> bool:
        """Return whether this rank is the first of those on its host that do not hang."""
        others = (rank for rank in range(self._world_size) if rank not in hanging)
        on_host = (rank for rank in others if self._last_beat(rank).get("host") == host)
        return next(on_host, None) == self._rank

    def end_stopped(self) -> None:
        """Kill ranks of this host that do not even beat, as a process that was stopped.

        After this rank has said all: who started the ranks kills all when one is killed, and would
        know of no more than that. So one rank of a host does it, the first.
        """
        for rank, beat in self._stopped.items():
            with suppress(dist.DistError):
                self._store.set(f"{ENDED}/{rank}", _describe(rank, beat, beat))
            with suppress(ProcessLookupError):
                os.kill(beat["pid"], signal.SIGKILL)

    def _give_time(self) -> None:
        """Wait for the others' answers, but not where this rank is told to stop meanwhile."""
        latest = time.monotonic() + _ANSWER_S
        while time.monotonic() < latest and not self.is_told:
            time.sleep(0.05)

    def _last_beat(self, rank: int) -> dict[str, Any]:
        if not self._store.check([f"beat/{rank}"]):
            return {}
        return json.loads(self._store.get(f"beat/{rank}"))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.is_told:
            self._told_at = time.monotonic()  # first, as another thread looks at it
            self.is_told = True
            self.stop_signal = self.stop_signal or number

    def _run(self) -> None:
        while not self._ended.is_set():
            step, doing, since, limit_s = self._place
            still_s = time.monotonic() - since
            if self._asked.is_set():
                log.error("rank %d hangs, %s at step %d, and is ended", self._rank, doing, step)
                self._leave(HUNG_CODE)
            if os.getppid() != self._parent and not self.is_told:
                log.error("rank %d: the process that started it is gone; stopping", self._rank)
                self._note(signal.SIGTERM, None)
            if self.is_told and time.monotonic() - self._told_at > self._stop_timeout_s:
                log.error(
                    "rank %d did not stop within %g s (%s since step %d)",
                    self._rank,
                    self._stop_timeout_s,
                    doing,
                    step,
                )
                self._leave(128 + self.stop_signal)
            if still_s > limit_s:
                log.error(
                    "rank %d hangs: %s for %.0f s at step %d", self._rank, doing, still_s, step
                )
                self._leave(HUNG_CODE)
            self._ended.wait(_BEAT_S / 4)

    def _tell(self) -> None:
        """Tell the store each second where this rank is, and hear what others say."""
        while not self._ended.is_set():
            step, doing, since, _ = self._place
            try:
                self._beats += 1
                still_s = time.monotonic() - since
                beat = {"step": step, "doing": doing, "for_s": still_s, "beats": self._beats}
                who = {"host": platform.node(), "pid": os.getpid()}
                self._store.set(f"beat/{self._rank}", json.dumps(beat | who))
                if self._store.check([f"stack/{self._rank}"]):
                    self._asked.set()
                if self.is_told:
                    self._store.set("stop", str(self.stop_signal))
                elif not self.stop_signal and self._store.check(["stop"]):
                    self.stop_signal = int(self._store.get("stop"))
                self._answered_at = time.monotonic()
            except Exception:  # the main thread finds out for itself, and says so
                log.debug("rank %d cannot tell the store where it is", self._rank)
            self._ended.wait(_BEAT_S)

    def _leave(self, code: int) -> None:
        self._show_stacks()
        os._exit(code)

    def _show_stacks(self) -> None:
        with suppress(OSError):  # the disk may be full that the console is on
            print(f"stacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)


def _describe(rank: int, before: dict[str, Any], after: dict[str, Any]) -> str:
    if not after:
        return f"rank {rank} gave no sign of life"
    if before.get("beats") == after["beats"]:
        return (
            f"rank {rank} is gone or stopped; it was last at step {after['step']}, {after['doing']}"
        )
    return f"rank {rank} hangs: {after['doing']} for {after['for_s']:.0f} s, step {after['step']}"
