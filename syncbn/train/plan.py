"""How many optimizer steps a run has, in all and within an epoch."""

from syncbn.train.data.sampling import TrainingShare
from syncbn.train.run.checkpoint import Position
from syncbn.train.schema import TrainConfig


class Plan:
    """The optimizer steps of a run, from its beginning, or from where it goes on.

    Args:
        config: the job.
        share: this rank's batches.
        world_size: the number of ranks.

    Attributes:
        samples: of a whole epoch, over all ranks.
        world_size: as passed.
        steps_per_epoch: steps of a whole epoch.
        total_steps: steps that will have been made at the end.
    """

    def __init__(self, config: TrainConfig, share: TrainingShare, world_size: int) -> None:
        self._config = config
        self._share = share
        self.samples = share.size_of_epoch
        self.world_size = world_size
        self.steps_per_epoch = self.steps_from(0)
        self.total_steps = self._capped(config.epochs * self.steps_per_epoch)

    def steps_from(self, samples: int) -> int:
        """Return the steps from a position in an epoch, in samples, to its end."""
        return self._share.steps(samples, self._config.optim.accumulate)

    def go_on_at(self, position: Position) -> None:
        """Count the steps from a position, at which perhaps another number of ranks has arrived."""
        left = self.steps_from(position.samples)
        whole = self._config.epochs - position.epoch - 1
        if whole < 0:
            left, whole = 0, 0
        self.total_steps = self._capped(position.step + left + whole * self.steps_per_epoch)

    def epochs_done(self, position: Position) -> float:
        """Return how many passes over the data are done at a position."""
        left = self.steps_from(position.samples)
        return position.epoch + 1 - left / self.steps_per_epoch

    def _capped(self, steps: int) -> int:
        limit = self._config.max_steps
        return steps if limit is None else min(steps, limit)
