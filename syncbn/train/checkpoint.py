"""Checkpoints: all that a run needs to go on after a whole epoch as if it had not stopped."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.errors import TrainingError


@dataclass(frozen=True)
class Checkpoint:
    """The state after `epoch` epochs and `step` optimizer steps, and the last epoch's metrics.

    What is random in an epoch depends on the seed and the epoch alone, so no generator is stored.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


def write_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Replace a checkpoint; a kill at any moment leaves the old one or the new one, whole."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(vars(checkpoint), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def read_checkpoint(file: Path) -> Checkpoint:
    """Return a checkpoint, its tensors on the CPU; executes no code from the file.

    Raises:
        TrainingError: the file cannot be read as a checkpoint.
    """
    try:
        return Checkpoint(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise TrainingError(f"cannot resume from {file}: {error}") from error


def share_checkpoint(file: Path | None) -> Checkpoint | None:
    """Return rank 0's checkpoint on every rank, or None where there is none yet.

    Collective: two broadcasts, of the checkpoint's size; only rank 0 reads the disk.

    Args:
        file: the checkpoint's path on rank 0; None on the others.

    Raises:
        TrainingError: on every rank, where rank 0 cannot read the file.
    """
    found: list[Checkpoint | TrainingError | None] = [None]
    if file is not None and file.exists():
        try:
            found = [read_checkpoint(file)]
        except TrainingError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], TrainingError):
        raise found[0]
    return found[0]
