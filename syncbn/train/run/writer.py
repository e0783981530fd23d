"""What rank 0 writes while it trains; a failure to is told to all ranks, which stop together."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from syncbn.errors import TrainingError
from syncbn.train.agreement import from_rank_0
from syncbn.train.generators import generator_states
from syncbn.train.run.checkpoint import Checkpoint, CheckpointWriter
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.reasons import reason_of


class Records:
    """Writes a run's lines and checkpoints on rank 0, and nothing on the others.

    Args:
        run: where rank 0 writes; None on the other ranks.
        keep: how many checkpoints are kept, besides the best.
        device: where this rank computes, whose random generator belongs to a checkpoint.
    """

    def __init__(self, run: RunDirectory | None, keep: int, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._writer = None if run is None else CheckpointWriter(run.checkpoints_dir, keep)
        self._failure: TrainingError | None = None

    @property
    def failed(self) -> bool:
        """Whether something could not be written, of which the other ranks do not know."""
        return self._failure is not None

    def write(self, what: Callable[[RunDirectory], None]) -> None:
        """Write on rank 0, at once."""
        if self._run is None:
            return
        try:
            what(self._run)
        except OSError as error:
            failure = TrainingError(f"cannot write to {self._run.path}: {error.strerror}")
            self._fail(failure.because(reason_of(error)))

    def write_checkpoint(
        self, make: Callable[[list[dict[str, Any]]], Checkpoint], is_best: bool
    ) -> None:
        """Write a checkpoint on rank 0, in the background, with the generators of all ranks.

        Collective: gathers those.

        Args:
            make: returns the checkpoint, given the generators of each rank.
            is_best: whether it is the best so far.
        """
        states: list[Any] | None = None if self._run is None else [None] * dist.get_world_size()
        dist.gather_object(generator_states(self._device), states)
        if self._writer is None or states is None:
            return
        try:
            self._writer.write(make(states), is_best)
        except TrainingError as error:
            self._fail(error)

    def finish(self) -> None:
        """Wait until all is written.

        Collective: one broadcast.

        Raises:
            TrainingError: something could not be written, on every rank.
        """
        if self._writer is not None:
            try:
                self._writer.wait()
            except TrainingError as error:
                self._fail(error)
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise where something could not be written.

        Collective: one broadcast.

        Raises:
            TrainingError: it could not, on every rank.
        """
        failure = from_rank_0(self._failure)
        if failure is not None:
            raise failure

    def _fail(self, failure: TrainingError) -> None:
        # What comes later follows from the first.
        self._failure = self._failure or failure.with_traceback(None)
