"""How far a run is: status.json, written about once a second while it trains, by rank 0.

It is for who looks, and nothing else: no run goes on by it, and one that cannot write it goes on
without. Reading it does not load torch.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

STATUS_FILE = "status.json"

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
# From one write to the next, however fast phases change.
_LEAST_S = 0.1
# A file system over a network may hang; the run's end does not wait for it.
_END_TIMEOUT_S = 5


class Phase(StrEnum):
    """What a run does."""

    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    RECALIBRATING = "recalibrating"
    EXPORTING = "exporting"
    PUBLISHING = "publishing"
    STOPPING = "stopping"
    DONE = "done"


@dataclass(frozen=True)
class Status:
    """How far an attempt at a run is; all times are in seconds since 1970.

    Attributes:
        attempt: its number, from 1.
        started: when it began.
        updated: when this was true.
        phase: what it does.
        step: the optimizer steps that are made.
        total_steps: those of the whole run; None before that is known.
        epoch: the passes over the training data that are made, with the part of the present one.
        epochs: those of the whole run.
        images_per_s: the speed of training in this epoch; None before its first step.
        time_left_s: until the last step, at the pace of this attempt; None while that is unknown,
            and after that step.
        restarts: how often all its ranks were started again in this attempt.
    """

    attempt: int
    started: float
    updated: float
    phase: str = Phase.LOADING
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    epochs: int | None = None
    images_per_s: float | None = None
    time_left_s: float | None = None
    restarts: int = 0


def write_status(directory: Path, status: Status) -> None:
    """Replace the status of a run; who reads it sees the one before, or this one.

    Not synced to the disk, as nothing depends on it.

    Raises:
        OSError: it cannot be written; the one before is there still.
    """
    temporary = directory / f"{STATUS_FILE}.tmp"
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(status)) + "\n")
        temporary.replace(directory / STATUS_FILE)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_status(directory: Path) -> Status | None:
    """Return what status.json of a run says; None if there is none, or it says nothing."""
    try:
        values = json.loads((directory / STATUS_FILE).read_text())
        known = {field.name for field in dataclasses.fields(Status)}
        numbers = ("attempt", "started", "updated")
        is_whole = all(isinstance(values[name], int | float) for name in numbers)
        known_values = {name: value for name, value in values.items() if name in known}
        return Status(**known_values) if is_whole else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


class Reporter:
    """Keeps status.json as it is, from a thread of its own: the caller waits for no disk.

    Args:
        directory: of the run; None on other ranks than 0, of which nothing is told.
        begun: the status with which the attempt began.
    """

    def __init__(self, directory: Path | None, begun: Status) -> None:
        self._directory = directory
        self._status = begun
        self._first: tuple[int, float] | None = None
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)

    def __enter__(self) -> "Reporter":
        if self._directory is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.enter(Phase.DONE)
        self._ended.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(_END_TIMEOUT_S)

    def enter(self, phase: Phase) -> None:
        """Tell what the run does from now on."""
        if phase != self._status.phase:
            self._status = dataclasses.replace(self._status, phase=phase)
            self._changed.set()

    @contextmanager
    def during(self, phase: Phase) -> Generator[None]:
        """Tell what the run does within the context, after which it does again what it did."""
        before = Phase(self._status.phase)
        self.enter(phase)
        yield
        self.enter(before)

    def begin(self, step: int, total_steps: int, epoch: float) -> None:
        """Tell where training begins, or goes on.

        Args:
            step: the steps that are made.
            total_steps: those of the whole run.
            epoch: the passes over the data that are made, with the part of the present one.
        """
        found = {"step": step, "total_steps": total_steps, "epoch": epoch}
        self._status = dataclasses.replace(self._status, **found)
        self.enter(Phase.TRAINING)

    def note(self, step: int, epoch: float, images_per_s: float) -> None:
        """Tell that a step is made.

        Args:
            step: the steps that are made.
            epoch: the passes over the data that are made, with the part of the present one.
            images_per_s: the speed of training, over all ranks.
        """
        status, now = self._status, time.monotonic()
        first, since = self._first = self._first or (step, now)  # it may be slow: it compiles
        left = None if status.total_steps is None else status.total_steps - step
        self._status = dataclasses.replace(
            status,
            step=step,
            epoch=epoch,
            images_per_s=images_per_s,
            time_left_s=left * (now - since) / (step - first) if left and step > first else None,
        )

    def _work(self) -> None:
        assert self._directory is not None
        is_told = False
        while True:
            ended = self._ended.is_set()
            try:
                status = dataclasses.replace(self._status, updated=time.time())
                write_status(self._directory, status)
            except OSError as error:
                if not is_told:  # a full disk is said once
                    log.warning("cannot write %s: %s", STATUS_FILE, error.strerror)
                is_told = True
            if ended:
                return
            self._ended.wait(_LEAST_S)
            self._changed.wait(_PERIOD_S - _LEAST_S)
            self._changed.clear()
