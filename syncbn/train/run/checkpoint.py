"""Checkpoints: all that a run needs to go on as if it had not stopped, verified when read."""

import hashlib
import io
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import TrainingError
from syncbn.train.run.reasons import reason_of

log = logging.getLogger(__name__)

_MAGIC = b"syncbn-checkpoint 2 "
_MAGIC_1 = b"syncbn-checkpoint 1 "  # of a version with other sums, and only accuracies
_NAME = re.compile(r"step-(\d+)\.ckpt")
BEST = "best.ckpt"


@dataclass(frozen=True)
class Position:
    """Where in a run: passes begun, samples of this pass that are done on all ranks, and steps."""

    epoch: int = 0
    samples: int = 0
    step: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The state before the step at `position`.

    Attributes:
        position: where the run goes on.
        world_size: how many ranks wrote it.
        metrics: of the last whole epoch, and `best` those of the best one.
        sums: what was added up in this epoch; see `syncbn.train.state.Sums`.
        states: state dicts by name: model, optimizer, schedule, scaler, average, shifts.
        generators: the state of each rank's random generators.
        data_sha256: of the data that it was trained on; "" if that is not known.
    """

    position: Position
    world_size: int
    metrics: dict[str, float]
    best: dict[str, float]
    sums: list[float]
    states: dict[str, Any] = field(repr=False)
    generators: list[dict[str, Any]] = field(repr=False)
    data_sha256: str = ""

    @property
    def is_best(self) -> bool:
        """Whether it was taken at the end of the best epoch."""
        latest = self.metrics.get("epoch")
        return (
            self.position.samples == 0 and latest is not None and latest == self.best.get("epoch")
        )


def encode(checkpoint: Checkpoint) -> bytes:
    """Return a checkpoint as bytes: one line with their SHA-256, then what `torch.save` writes."""
    content = io.BytesIO()
    fields = vars(checkpoint) | {"position": vars(checkpoint.position)}
    torch.save(fields, content)
    body = content.getbuffer()
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_checkpoint(file: Path) -> Checkpoint:
    """Return a checkpoint, its tensors on the CPU; executes no code from the file.

    Raises:
        TrainingError: the file cannot be read, or is not what was written.
    """
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror}") from error
    digest = hashlib.sha256(body).hexdigest().encode()
    if head not in (_MAGIC + digest, _MAGIC_1 + digest):
        raise TrainingError(
            f"{file} is damaged: its content has another SHA-256 than its head says"
        )
    try:
        fields = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        if head.startswith(_MAGIC_1):
            # Only the mean loss and the accuracy of the epoch that is under way are not whole then.
            fields["sums"] = []
        return Checkpoint(**fields | {"position": Position(**fields["position"])})
    except Exception as error:  # whatever an archive of another version makes torch raise
        raise TrainingError(f"{file} is not a checkpoint of this version: {error}") from error


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the checkpoints of a run by their steps, newest first; without the best."""
    if not directory.is_dir():
        return []
    found = [file for file in directory.iterdir() if _NAME.fullmatch(file.name)]
    return sorted(found, key=_step, reverse=True)


def read_newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is intact, or None where there is none at all.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    problems: list[str] = []
    for file in checkpoint_files(directory):
        try:
            return read_checkpoint(file)
        except TrainingError as error:
            problems.append(str(error))
            log.warning("%s; trying the one before", error)
    if problems:
        raise TrainingError(
            f"cannot resume, no checkpoint is intact: {'; '.join(problems)}; to start from the "
            f"beginning, delete {directory}"
        )
    return None


def name_best(directory: Path, position: Position) -> None:
    """Let the checkpoint of a position be the best one, if a kill came before it was.

    Raises:
        TrainingError: its file cannot be given a second name.
    """
    file, best = _file(directory, position), directory / BEST
    temporary = file.with_suffix(".tmp")
    try:
        if best.exists() and best.samefile(file):
            return
        temporary.unlink(missing_ok=True)  # which that kill may have left
        _link(file, temporary)
        temporary.replace(best)
    except OSError as error:
        raise TrainingError(
            f"cannot write {best}: {error.strerror}; make room, and resume"
        ).because(reason_of(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes checkpoints of a run in the background, one at a time, and deletes old ones.

    A kill at any moment leaves the files that were there, and a new one whole or not at all.

    Args:
        directory: where they go; made if need be. What a kill has left half written is deleted.
        keep: how many are kept, besides the best.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        # One may be a second name of a checkpoint, which writing to it would damage.
        for temporary in directory.glob("*.tmp"):
            with suppress(OSError):  # as writing will say
                temporary.unlink()

    def write(self, checkpoint: Checkpoint, is_best: bool) -> None:
        """Copy the state and write the copy in the background, after any earlier write.

        Raises:
            TrainingError: the write before this one failed.
        """
        self.wait()
        copy = _copied(vars(checkpoint))
        self._pending = self._thread.submit(self._write, Checkpoint(**copy), is_best)

    def wait(self) -> None:
        """Return once everything is on the disk.

        Raises:
            TrainingError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise TrainingError(
                f"cannot write a checkpoint to {self._directory}: {error.strerror}; the ones "
                "before it are intact, make room and resume"
            ).because(reason_of(error)) from error

    def _write(self, checkpoint: Checkpoint, is_best: bool) -> None:
        self._directory.mkdir(exist_ok=True)
        file = _file(self._directory, checkpoint.position)
        temporary = file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(encode(checkpoint))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
            if is_best:  # a kill before this is made up for by `name_best`
                _link(file, temporary)
                temporary.replace(self._directory / BEST)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(self._directory)
        for old in checkpoint_files(self._directory)[self._keep :]:
            old.unlink()


def _file(directory: Path, position: Position) -> Path:
    return directory / f"step-{position.step:09d}.ckpt"


def _step(file: Path) -> int:
    matched = _NAME.fullmatch(file.name)
    assert matched
    return int(matched[1])


def _copied(value: Any) -> Any:
    """Return a state with every tensor copied to the CPU, so that training may go on meanwhile."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _link(file: Path, name: Path) -> None:
    """Give a file a second name, or a copy where the file system knows no links."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def _sync(directory: Path) -> None:
    """Make renames last through a loss of power, where directories can be synced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
