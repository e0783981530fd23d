"""Processes that are started, stopped, let go on, and killed with all their descendants."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.bench.serve.wires import Headers

OUTPUT = "output"  # the file that has what a process prints
_SPAWN = multiprocessing.get_context("spawn")
_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


@contextmanager
def helper(work: Callable[..., None], *arguments: Any) -> Generator[Callable[[Any], Any]]:
    """Run a function in a process of its own; yield what asks it something and returns its answer.

    Args:
        work: called with its end of a pipe and the arguments, until it is sent None.
        *arguments: to be pickled.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()

    def ask(question: Any) -> Any:
        ours.send(question)
        return ours.recv()

    try:
        yield ask
    finally:
        process.kill()
        process.join()


def family(pid: int) -> list[int]:
    """Return a process and its descendants, in whatever groups and sessions; parents first."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which is in parentheses and may hold any others: state and parent.
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def no_process_left() -> Generator[None]:
    """Kill all that descends from this process in the end, which a signal may bring."""
    # Or orphans would become children of process 1.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        _kill(family(os.getpid())[1:])


@contextmanager
def started(
    command: list[str], directory: Path, environment: Headers
) -> Generator[subprocess.Popen[bytes]]:
    """Run a server in a directory, its output to a file there; kill it and its children after."""
    with (directory / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill(family(process.pid))
        process.wait()
