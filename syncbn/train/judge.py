"""When a step must be the last: a loss or a gradient that is not finite, or a file not written."""

import logging
import math
from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from syncbn.errors import TrainingError
from syncbn.train.agreement import gathered
from syncbn.train.run.reasons import NOT_FINITE
from syncbn.train.run.writer import Records
from syncbn.train.schema import TrainConfig
from syncbn.train.setup import Training
from syncbn.train.state import State
from syncbn.train.step import Step

log = logging.getLogger(__name__)


def is_good(model: nn.Module) -> bool:
    """Return whether a model can be trained on: its weights are finite, and no buffer is NaN.

    Collective: the ranks tell each other, as each may have buffers for itself; all return the same.
    """
    finite = all(bool(each.isfinite().all()) for each in model.parameters())
    good = finite and not any(bool(each.isnan().any()) for each in model.buffers())
    return all(gathered(good))


class Judge:
    """Looks at each step, and raises, on every rank, if training cannot go on after it.

    Args:
        config: the job.
        training: what is trained.
        state: where the run is; goes back to before a step that is given up.
        records: writes the state before it.
        checkpoint: writes the present state.
        samples: of an epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        training: Training,
        state: State,
        records: Records,
        checkpoint: Callable[[], None],
        samples: int,
    ) -> None:
        self._config = config
        self._training = training
        self._state = state
        self._records = records
        self._checkpoint = checkpoint
        self._samples = samples

    def look_at(self, step: Step) -> None:
        """Raise if the totals of a step say that it must be the last.

        Raises:
            TrainingError: a file cannot be written, or the loss is not finite; on every rank.
        """
        if step.totals.failures:
            self._records.raise_failure()
        if not math.isfinite(step.totals.loss):
            finite = gathered(math.isfinite(step.own_loss))
            ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
            where = ranks or "only all ranks together"
            self._give_up(step, f"the training loss is {step.loss}", f", ranks {where}")

    def look_at_skip(self, step: Step) -> None:
        """Raise if a step whose gradient is not finite must be the last; say so otherwise.

        A scaled loss, in float16, may overflow: its scale is halved, and training goes on, unless
        that happens too often in a row.

        Raises:
            TrainingError: the gradient is not finite; on every rank.
        """
        scaler = self._training.scaler
        if not scaler.is_enabled():
            self._give_up(step, f"the loss is {step.loss:.4g} and its gradient not finite", "")
        in_a_row = int(self._state.sums.skipped_in_a_row) + 1
        most = self._config.numerics.max_skipped_steps
        if in_a_row > most:
            self._give_up(
                step,
                f"the gradient was not finite in {in_a_row} steps in a row (at most "
                f"numerics.max_skipped_steps={most}), each with a smaller scale of the loss",
                "",
            )
        if dist.get_rank() == 0:
            log.info(
                "step %d is skipped: its gradient overflowed float16 (%d in a row); the scale of "
                "the loss is halved",
                step.after.step,
                in_a_row,
            )

    def _give_up(self, step: Step, what: str, where: str) -> None:
        """Write the state before a step, and raise what is known of it."""
        training, position = self._training, step.before
        self._state.position = position
        step.kept.restore()
        good = is_good(training.model)
        if good:
            self._checkpoint()
            self._records.finish()
        kept_state = (
            f"the state before this step is in checkpoints/step-{position.step:09d}.ckpt"
            if good
            else "the weights were not finite before it, so only older checkpoints are good"
        )
        rate = training.schedule.get_last_lr()[0]
        raise TrainingError(
            f"{what} at step {position.step + 1} (epoch {position.epoch + 1}, after "
            f"{position.samples} of {self._samples} samples, learning rate {rate:g}{where}); "
            f"{kept_state}; try a lower optim.lr than {self._config.optim.lr:g}, or "
            "optim.clip_norm=1"
        ).because(NOT_FINITE)
