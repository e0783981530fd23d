"""One optimizer step: forward and backward, what all ranks say of it, and the update."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from syncbn.baselines import Renormalizer
from syncbn.train.checkpoint import Position
from syncbn.train.generators import KeptGenerators
from syncbn.train.optim import take_step
from syncbn.train.records import Records
from syncbn.train.sampling import Batch
from syncbn.train.schema import SYNCHRONISED
from syncbn.train.state import Training
from syncbn.train.totals import Report, Statement, StepTotals, Totals
from syncbn.train.watch import Watch

_UNKNOWN = StepTotals(math.nan, math.nan, 0, 0)


class Kept:
    """What a step changes before its loss is known, as it was before.

    The buffers, torch's generators, and the scale of a float16 loss.
    Memory: a copy of all buffers.

    Args:
        training: whose state is kept.
    """

    def __init__(self, training: Training) -> None:
        self._scaler = training.scaler
        self._device = training.device
        self._buffers = list(training.model.buffers())
        self.buffers = [buffer.clone() for buffer in self._buffers]
        # By dtype, as only tensors of one are copied by one call of the device.
        self._pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]
        self._pairs = defaultdict(lambda: ([], []))
        for kept, buffer in zip(self.buffers, self._buffers, strict=True):
            self._pairs[buffer.dtype][0].append(kept)
            self._pairs[buffer.dtype][1].append(buffer)
        self.keep()

    def keep(self) -> None:
        """Take what is there now."""
        for kept, buffers in self._pairs.values():
            torch._foreach_copy_(kept, buffers)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- one call, as the optimizers of torch do
        self._generators = KeptGenerators(self._device)
        if self._scaler.is_enabled():
            scale = self._scaler._scale, self._scaler._growth_tracker  # pyright: ignore[reportPrivateUsage] -- its state_dict would make the host wait for the device
            self._scale = [None if each is None else each.clone() for each in scale]

    def restore(self) -> None:
        """Return to what was kept."""
        for buffer, kept in zip(self._buffers, self.buffers, strict=True):
            buffer.copy_(kept)
        self._generators.restore()
        if self._scaler.is_enabled():
            self._scaler._scale, self._scaler._growth_tracker = self._scale  # pyright: ignore[reportPrivateUsage] -- as above


@dataclass
class Step:
    """An optimizer step, and what it came to.

    Attributes:
        before: the position at which it was made, and `after` the next one.
        samples: how many it was made of, over all ranks.
        kept: what its forward passes changed, as it was before.
        rate: the learning rate.
        totals: what all ranks say of it.
        own_loss: this rank's part of the loss.
        extra: what there is to say besides, by name.
    """

    before: Position
    after: Position
    samples: int
    kept: Kept
    rate: float = 0.0
    totals: StepTotals = _UNKNOWN
    own_loss: float = 0.0
    extra: dict[str, float] = field(default_factory=dict[str, float])


class Stepper:
    """Makes optimizer steps on this rank, in step with the others.

    The ranks add up the loss before the weights change, so that one that is not finite never
    reaches them.

    Args:
        training: what is trained.
        totals: adds up over the ranks.
        records: says whether this rank could write its files.
        watch: hears what this rank does, and of signals.
        judge: called with each step once its totals are known, before anything that follows from
            it; raises where training cannot go on.
    """

    def __init__(
        self,
        training: Training,
        totals: Totals,
        records: Records,
        watch: Watch,
        judge: Callable[[Step], None],
    ) -> None:
        self._training = training
        self._totals = totals
        self._records = records
        self._watch = watch
        self._judge = judge
        self._world_size = dist.get_world_size()
        self._kept = Kept(training)

    def make(self, micro: list[Batch], samples: int, before: Position, after: Position) -> Step:
        """Make a step of this rank's batches, and return what it came to.

        Communicates: what DDP and the layers do, and the totals.

        Args:
            micro: the batches whose gradients make the step together; not empty.
            samples: how many samples the batches of all ranks have.
            before: the position of the step.
            after: the position of the next one.
        """
        training = self._training
        self._kept.keep()
        step = Step(before, after, samples, self._kept)
        statement = self._forward_and_backward(micro, step)
        self._watch.at(before.step, "waiting for the other ranks")
        self._totals.start(statement)
        self._know(step, self._totals.read())
        self._update(step)
        training.schedule.step()
        if training.renormalizer is not None:
            step.extra |= self._renormalize(training.renormalizer, micro)
        if training.average is not None:
            training.average.update_parameters(training.model)
        return step

    def _forward_and_backward(self, micro: list[Batch], step: Step) -> Statement:
        """Compute the gradients, and return what this rank has to say of them."""
        training, watch = self._training, self._watch
        training.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        penalties: list[Tensor] = []
        watch.at(step.before.step, "in forward and backward")
        for number, (samples, labels) in enumerate(micro):
            with self._mode_for(samples), self._no_sync_unless(number == len(micro) - 1):
                inputs = training.inputs(samples)
                targets = labels.to(training.device, non_blocking=True)
                with training.autocast(), self._watching():
                    logits: Tensor = training.replica(inputs)
                # The sum, as shares may differ in size; DDP then takes the mean over ranks.
                loss = functional.cross_entropy(
                    logits.float() if logits.dtype != torch.float64 else logits,
                    targets,
                    reduction="sum",
                    label_smoothing=training.config.optim.label_smoothing,
                )
                cost = loss * (self._world_size / step.samples)
                if training.penalty is not None:  # the same on all ranks, and their mean itself
                    penalty = training.penalty.value() / len(micro)
                    penalties.append(penalty.detach())
                    cost = cost + penalty.to(cost.dtype)
                training.scaler.scale(cost).backward()
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(1) == targets).sum())
        return Statement(losses, correct, penalties, watch.stop_signal, self._records.failed)

    def _know(self, step: Step, report: Report) -> None:
        """Note what the ranks say of a step, and raise where training cannot go on."""
        step.totals, step.own_loss = report.totals, report.own_loss
        if self._training.penalty is not None:
            step.extra["penalty"] = report.penalty
        self._judge(step)

    def _update(self, step: Step) -> None:
        """Change the weights by the gradients."""
        training = self._training
        step.rate = float(training.schedule.get_last_lr()[0])
        take_step(training.optimizer, training.scaler, training.config.optim.clip_norm)

    def _renormalize(self, renormalizer: Renormalizer, micro: list[Batch]) -> dict[str, float]:
        """Make the units standard on the samples of the step that was just made."""
        training = self._training
        samples = torch.cat([samples for samples, _ in micro])

        def forward() -> None:
            with training.autocast():
                training.model(training.inputs(samples))

        done = renormalizer.step(forward)
        return {"undone_mean": done.mean_shift, "undone_log_scale": done.log_scale}

    def _watching(self) -> AbstractContextManager[None]:
        penalty = self._training.penalty
        return nullcontext() if penalty is None else penalty.watch()

    def _mode_for(self, samples: Tensor) -> "_Evaluating | nullcontext[None]":
        """Return the mode for a share: one without samples must leave its own statistics alone."""
        if len(samples) == 0 and not isinstance(self._training.config.norm, SYNCHRONISED):
            return _Evaluating(self._training.replica)
        return nullcontext()

    def _no_sync_unless(self, last: bool) -> Any:
        return nullcontext() if last else self._training.replica.no_sync()


class _Evaluating:
    """A context in which a module is in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._module.eval()

    def __exit__(self, *error: object) -> None:
        self._module.train()
