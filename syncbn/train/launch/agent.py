"""The process between launcher and ranks: imports torch once, and forks the ranks of one job.

`python -m syncbn.train.launch.agent` gets the run's directory from standard input, a socket: a
line, and with it the descriptor of the directory's lock, which this process and the ranks hold from
then on. It may come long after torch is there. The end of standard input ends the job: if the
launcher is killed, its ranks write their state and stop.
"""

import importlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from syncbn.train.launch import worker
from syncbn.train.launch.watchdog import STOP_SIGNALS
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.lock import receive_job

_RENDEZVOUS_TIMEOUT_S = 60
_POLL_S = 0.1
_STUCK_S = 5
_PIPE_BYTES = 1 << 16  # all that fits in, so that no line is read in two


def main() -> int:
    """Start the ranks of a prepared run, wait for them, and return the exit code."""
    # DDP and optimizers load it, which takes a second: here once, and not in each rank.
    importlib.import_module("torch._dynamo")
    run_dir, lock = receive_job()
    if lock is None:  # there was no job for this one
        return 0
    run = RunDirectory(Path(run_dir))
    launch = run.read_config().launch
    threading.Thread(target=_end_with_launcher, name="launcher", daemon=True).start()
    # It reports in many lines what is reported here in one.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=launch.nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": _RENDEZVOUS_TIMEOUT_S},
        local_addr="localhost",
        max_restarts=launch.max_restarts,
        # This process computes nothing, so nothing of torch's is amiss in its forks.
        start_method="fork",
        shutdown_timeout=round(launch.stop_timeout_s),
        signals_to_handle="SIGQUIT",  # the others are passed on to the ranks, which stop in order
    )
    told: list[int] = []
    pids, pid_of_rank = os.pipe()
    os.set_blocking(pids, False)
    _look_after_ranks(pids, told, run)
    try:
        start = elastic_launch(config, worker.be_launched_rank)
        codes = start(str(run.path), pid_of_rank, lock.fileno())
    except ChildFailedError as error:
        if told:
            return 128 + told[0]
        _, first = error.get_first_failure()
        reason = _describe(first)
        print(f"syncbn-train: {reason}", file=sys.stderr)
        if run.read_result() is None:  # or else rank 0 knew more
            run.write_result(Result("failed", reason, {}, 0, 1))
        return 1
    return max(codes.values())


def _look_after_ranks(pids: int, told: list[int], run: RunDirectory) -> None:
    """Tell each rank once to stop when this process is told, and end where torch waits for ever.

    Torch waits for its ranks by an event, and setting it never returns where a rank was killed
    while it waited for it: after all have done their work (torch 2.14).

    Args:
        pids: the end of a pipe into which the ranks write their process identifiers, a line each.
        told: gets the number of the signal that told this process to stop.
        run: where the ranks say how they end.
    """
    agent = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != agent:  # a rank that has been forked, and does not watch yet
            raise SystemExit(128 + number)
        told.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, note)

    def look() -> None:
        passed: set[int] = set()
        started: set[int] = set()
        alive: set[int] = set()
        since = time.monotonic()
        while True:
            time.sleep(_POLL_S)
            running = {rank for rank in started if is_running(rank)}
            if new := _read_numbers(pids):  # an attempt begins, before which the last one has ended
                running |= new
                started = set(running)
            if running != alive:
                alive, since = running, time.monotonic()
            for rank in alive - passed if told else ():
                passed.add(rank)
                with suppress(ProcessLookupError):
                    os.kill(rank, told[0])
            if started - alive and time.monotonic() - since > _STUCK_S:
                result = run.read_result()
                if result is not None:
                    for rank in alive:
                        with suppress(ProcessLookupError):
                            os.kill(rank, signal.SIGKILL)
                    os._exit(result.exit_code)

    threading.Thread(target=look, name="ranks", daemon=True).start()


def _read_numbers(pipe: int) -> set[int]:
    """Return the numbers, a line each, that are in a pipe."""
    try:
        return {int(line) for line in os.read(pipe, _PIPE_BYTES).splitlines()}
    except BlockingIOError:
        return set()


def is_running(child: int) -> bool:
    """Return whether a child process has not ended.

    Its exit code is left to torch, which fails if another thread gets it in the same moment.
    """
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _end_with_launcher() -> None:
    """Stop the job when the other end of standard input is closed, in whatever way."""
    with suppress(ConnectionResetError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _describe(failure: ProcessFailure) -> str:
    """Return in one line why a rank ended."""
    if failure.exitcode < 0:
        return f"rank {failure.local_rank} was killed by {failure.signal_name()}"
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", message)
    text = str(message).strip().splitlines()
    if text and not text[0].startswith("To enable traceback"):  # torch's word for no message
        return f"rank {failure.local_rank}: {text[0]}"
    return f"rank {failure.local_rank} ended with exit code {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main())
