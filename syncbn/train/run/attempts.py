"""The attempts at a run: which one is under way, and how the ones before it ended.

An attempt begins when its ranks are started, and ends with its result. What it leaves lies beside
the run's files until the next one begins, and in attempts.jsonl from then on.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from syncbn.train.run.files import replace_file
from syncbn.train.run.reasons import KILLED, presumed
from syncbn.train.run.result import RESULT_FILE, Result, decode_result, encode_result, read_result
from syncbn.train.run.status import (
    STATUS_FILE,
    Phase,
    Reporter,
    Status,
    read_status,
    write_status,
)

ATTEMPTS_FILE = "attempts.jsonl"

log = logging.getLogger(__name__)

_KILLED_CODE = 137  # 128 + SIGKILL


def read_attempts(directory: Path) -> list[Result]:
    """Return how the attempts ended, in their order, without one that is under way."""
    kept, last = _read_kept(directory), read_result(directory)
    return kept if last is None or _holds(kept, last.attempt) else [*kept, last]


def begin_attempt(directory: Path, epochs: int) -> Status:
    """Say that an attempt begins now, the one before having been kept, and return its status.

    Args:
        directory: of the run.
        epochs: of the whole run.
    """
    now = time.time()
    status = Status(_next(directory), now, now, epochs=epochs)
    with suppress(OSError):  # a full disk, of which training will say more
        write_status(directory, status)
    return status


def note_restart(directory: Path) -> None:
    """Say that all ranks of the attempt that is under way are started again.

    Args:
        directory: of the run.
    """
    status = read_status(directory)
    if status is None:
        return
    again = dataclasses.replace(status, restarts=status.restarts + 1, updated=time.time())
    with suppress(OSError):  # a full disk, of which training will say more
        write_status(directory, again)


def report_attempt(directory: Path | None, epochs: int) -> Reporter:
    """Return what tells how far the attempt is that is under way, or that nobody has begun.

    Args:
        directory: of the run; None on other ranks than 0, whose reporter tells nobody.
        epochs: of the whole run.
    """
    if directory is None:
        return Reporter(None, Status(1, 0.0, 0.0))
    begun = read_status(directory) or begin_attempt(directory, epochs)
    # Of ranks that were killed and are started again, it says what they did last.
    again = dataclasses.replace(
        begun, phase=Phase.LOADING, epochs=epochs, images_per_s=None, time_left_s=None
    )
    return Reporter(directory, again)


def keep_attempt(directory: Path, metrics: Mapping[str, float]) -> None:
    """Put what the last attempt left with the attempts before it, and away.

    Args:
        directory: of the run.
        metrics: of the best epoch so far, for an attempt that left no word.

    Raises:
        OSError: it cannot be written; nothing is lost.
    """
    last, status = read_result(directory), read_status(directory)
    if last is None and status is not None:
        last = _lost(status, metrics)
    kept = _read_kept(directory)
    if last is not None and not _holds(kept, last.attempt):
        file = directory / ATTEMPTS_FILE
        before = file.read_text(errors="replace").splitlines() if file.exists() else []
        replace_file(file, "".join(f"{line}\n" for line in before) + encode_result(last))
    for name in (RESULT_FILE, STATUS_FILE):
        (directory / name).unlink(missing_ok=True)


def completed(directory: Path, result: Result) -> Result:
    """Return the result of the attempt that is under way, with what it does not say itself."""
    status, ended = read_status(directory), result.ended or time.time()
    started = result.started or (ended - result.duration_s if status is None else status.started)
    return dataclasses.replace(
        result,
        reason=result.reason or presumed(result.status, result.exit_code),
        attempt=result.attempt or (_next(directory) if status is None else status.attempt),
        started=started,
        ended=ended,
        duration_s=result.duration_s or max(0.0, ended - started),
    )


def _lost(status: Status, metrics: Mapping[str, float]) -> Result:
    """Return how an attempt ended that left nothing but what it last said of itself."""
    return Result(
        "lost",
        f"killed while {status.phase}, after step {status.step}: it left no result",
        dict(metrics),
        max(0.0, status.updated - status.started),
        _KILLED_CODE,
        reason=KILLED,
        attempt=status.attempt,
        started=status.started,
        ended=status.updated,
    )


def _next(directory: Path) -> int:
    return 1 + max((result.attempt for result in _read_kept(directory)), default=0)


def _holds(results: Sequence[Result], attempt: int) -> bool:
    return any(result.attempt == attempt for result in results)


def _read_kept(directory: Path) -> list[Result]:
    """Return the attempts that are kept, without lines that are damaged, which is said."""
    try:
        lines = (directory / ATTEMPTS_FILE).read_text(errors="replace").splitlines()
    except OSError:
        return []
    results = [decode_result(line) for line in lines]
    if damaged := [str(number) for number, each in enumerate(results, 1) if each is None]:
        log.warning("%s: passed over damaged lines %s", ATTEMPTS_FILE, ", ".join(damaged))
    return [each for each in results if each is not None]
