"""One optimizer step: forward and backward, what all ranks say of it, and the update.

On the CPU, a step's loss is known before the weights change. On a GPU, the host may learn it one
step late: it orders the next forward and backward pass before it looks. Until then, whatever a loss
or a gradient that is not finite must not reach is protected in one of three ways:

- weights and the optimizer's state: the device tells the optimizer to skip the step;
- buffers, generators and the scale of the loss: the step before has a copy of its own;
- the schedule, the average and what is written: they wait until the step is known.
"""

import math
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.baselines import Renormalizer
from syncbn.comm.reducer import Reducer
from syncbn.train.data.sampling import Batch
from syncbn.train.generators import KeptGenerators
from syncbn.train.launch.watchdog import Watch
from syncbn.train.model_checks import explaining_unused, on_this_rank_alone
from syncbn.train.optim import can_skip, take_step
from syncbn.train.run.checkpoint import Position
from syncbn.train.run.writer import Records
from syncbn.train.schema import SYNCHRONIZED
from syncbn.train.setup import Training
from syncbn.train.totals import DeviceTotals, HostTotals, Statement, StepTotals, Totals

_UNKNOWN = StepTotals(math.nan, 0, 0, ())


class Kept:
    """What a step changes before its loss is known, as it was before.

    The buffers, the layers' shifts, torch's generators, and the scale of a float16 loss.
    Memory: a copy of all buffers and shifts.

    Args:
        training: whose state is kept.

    Attributes:
        buffers: the copies of the model's buffers, in their order.
    """

    def __init__(self, training: Training) -> None:
        self._scaler = training.scaler
        self._device = training.device
        buffers, shifts = list(training.model.buffers()), list(training.shifts().values())
        self._moving = [*buffers, *shifts]
        copies = [each.clone() for each in self._moving]
        self.buffers, self._copies = copies[: len(buffers)], copies
        # By dtype, as only tensors of one are copied by one call of the device.
        self._pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]
        self._pairs = defaultdict(lambda: ([], []))
        for kept, moving in zip(self._copies, self._moving, strict=True):
            self._pairs[moving.dtype][0].append(kept)
            self._pairs[moving.dtype][1].append(moving)
        self.keep()

    def keep(self) -> None:
        """Take what is there now."""
        for kept, moving in self._pairs.values():
            torch._foreach_copy_(kept, moving)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- one call, as the optimizers of torch do
        self._generators = KeptGenerators(self._device)
        if self._scaler.is_enabled():
            scale = self._scaler._scale, self._scaler._growth_tracker  # pyright: ignore[reportPrivateUsage] -- its state_dict would make the host wait for the device
            self._scale = [None if each is None else each.clone() for each in scale]

    def restore(self) -> None:
        """Return to what was kept."""
        for moving, kept in zip(self._moving, self._copies, strict=True):
            moving.copy_(kept)
        self._generators.restore()
        if self._scaler.is_enabled():
            self._scaler._scale, self._scaler._growth_tracker = self._scale  # pyright: ignore[reportPrivateUsage] -- as above


@dataclass
class Step:
    """An optimizer step, and what it came to.

    Attributes:
        before: the position at which it was made, and `after` the next one.
        samples: how many it was made of, over all ranks.
        weight: what they weigh in the mean of the losses.
        kept: what its forward passes changed, as it was before.
        rate: the learning rate.
        totals: what all ranks say of it.
        own_loss: this rank's part of the loss.
        skipped: whether its gradient was not finite, so that it left the weights as they were.
        extra: what there is to say besides, by name.
    """

    before: Position
    after: Position
    samples: int
    weight: float
    kept: Kept
    rate: float = 0.0
    totals: StepTotals = _UNKNOWN
    own_loss: float = 0.0
    skipped: bool = False
    extra: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def loss(self) -> float:
        """The mean of the losses; 0 of samples that weigh nothing."""
        return mean(self.totals.loss, self.weight)


def mean(total: float, weight: float) -> float:
    """Return total / weight; of nothing 0, unless the total itself is not finite."""
    return total / weight if weight else total


class Judge(Protocol):
    """What looks at steps, and raises if training cannot go on."""

    def look_at(self, step: Step) -> None:
        """Raise if a step, of which the totals are known, must be the last."""
        ...

    def look_at_skip(self, step: Step) -> None:
        """Raise if a step whose gradient is not finite must be the last."""
        ...


class Stepper:
    """Makes optimizer steps on this rank, in step with the others.

    The ranks add up the loss before the weights change, and look at the gradient, so that neither
    reaches them if it is not finite.

    Args:
        training: what is trained.
        totals: adds up over the ranks.
        control: sums what the hosts tell each other.
        records: says whether this rank could write its files.
        watch: hears what this rank does, and of signals.
        judge: looks at each step before anything follows from it.

    Attributes:
        is_late: whether the host learns what a step came to during the next one: on a GPU, if the
            optimizer can skip a step by itself, and nothing is to be done with its weights at once.
    """

    def __init__(
        self,
        training: Training,
        totals: Totals,
        control: Reducer,
        records: Records,
        watch: Watch,
        judge: Judge,
    ) -> None:
        self._training = training
        self._totals = totals
        self._control = control
        self._records = records
        self._watch = watch
        self._judge = judge
        self._world_size = dist.get_world_size()
        self._ahead = (
            totals
            if isinstance(totals, DeviceTotals)
            and can_skip(training.optimizer)
            and training.renormalizer is None
            else None
        )
        self.is_late = self._ahead is not None
        self._kept = [Kept(training) for _ in range(2 if self.is_late else 1)]
        self._unknown: Step | None = None

    def make(
        self, micro: list[Batch], samples: int, before: Position, after: Position
    ) -> Step | None:
        """Make a step of this rank's batches; return the one that is known by now, if one is.

        That is this one, or, where `is_late`, the one before it.

        Communicates: what DDP and the layers do, and the totals; one all-reduce of 1 float64
        before all that, if the task does not weigh samples alike.

        Args:
            micro: the batches whose gradients make the step together; not empty.
            samples: how many samples the batches of all ranks have.
            before: the position of the step.
            after: the position of the next one.
        """
        kept = self._kept[before.step % len(self._kept)]
        kept.keep()
        step = Step(before, after, samples, self._weigh(micro, samples), kept)
        self._forward_and_backward(micro, step)
        self._watch.at(before.step, "waiting for the other ranks")
        if self._ahead is not None:
            # The buffers have moved on since, but the weights have not.
            known = self._conclude(kept.buffers)
            self._update(step, self._ahead.diverged())
            self._unknown = step
            return known
        self._know(step)
        self._update(step)
        self._know_update(step)
        if self._training.renormalizer is not None:
            step.extra |= self._renormalize(self._training.renormalizer, micro)
        self._follow(step, None)
        return step

    def finish(self) -> Step | None:
        """Return the latest step, if it is not known yet; the host waits for it.

        To be called before anything but the next step looks at what is trained.
        """
        return self._conclude(None)

    def _conclude(self, buffers: list[Tensor] | None) -> Step | None:
        """Do what the latest step has left to do, given the buffers that followed from it."""
        step, self._unknown = self._unknown, None
        if step is not None:
            self._watch.at(step.before.step, "waiting for the other ranks")
            self._know(step)
            self._know_update(step)
            self._follow(step, buffers)
        return step

    def _weigh(self, micro: list[Batch], samples: int) -> float:
        """Return what the samples of all ranks weigh."""
        task = self._training.task
        if task.weighs_samples_alike:
            return samples
        weights = [task.weights(targets).double().sum() for _, targets in micro]
        return self._control.sum(torch.stack(weights).sum().reshape(1)).item()

    def _follow(self, step: Step, buffers: list[Tensor] | None) -> None:
        """Move what follows the weights, if they moved: the schedule, and the average."""
        if step.skipped:
            return
        self._training.schedule.step()
        if self._training.average is not None:
            self._training.average.update_parameters(self._training.model, buffers)

    def _forward_and_backward(self, micro: list[Batch], step: Step) -> None:
        """Compute the gradients, and have the ranks add up what they say of them."""
        training, watch = self._training, self._watch
        training.optimizer.zero_grad(set_to_none=True)
        task = training.task
        losses: list[Tensor] = []
        statistics: list[Tensor] = []
        penalties: list[Tensor] = []
        watch.at(step.before.step, "in forward and backward")
        for number, (samples, targets) in enumerate(micro):
            is_last = number == len(micro) - 1
            with self._mode_for(samples), self._no_sync_unless(is_last):
                inputs = training.inputs(samples)
                targets = targets.to(training.device, non_blocking=True)
                explaining = explaining_unused(training.model)
                with training.autocast(), self._watching(), explaining:
                    output: Any = training.replica(inputs)
                # The sum, as shares may differ in size; DDP then takes the mean over ranks.
                with on_this_rank_alone():
                    loss = task.losses(output, targets, True).sum()
                losses.append(loss.detach())
                answer = task.answer(output).detach()
                statistics.append(task.observe(answer, targets).sum(0))
                cost = loss * (self._world_size / step.weight if step.weight else 0.0)
                if training.penalty is not None:  # the same on all ranks, and their mean itself
                    penalty = training.penalty.value() / len(micro)
                    penalties.append(penalty.detach())
                    cost = cost + penalty.to(cost.dtype)
                if is_last and isinstance(self._totals, DeviceTotals):
                    self._totals.start(self._statement(losses, statistics, penalties))
                training.scaler.scale(cost).backward()
        if isinstance(self._totals, HostTotals):
            watch.at(step.before.step, "waiting for the other ranks")
            self._totals.start(self._statement(losses, statistics, penalties))

    def _statement(
        self, losses: list[Tensor], statistics: list[Tensor], penalties: list[Tensor]
    ) -> Statement:
        stop, failed = self._watch.stop_signal, self._records.failed
        return Statement(losses, statistics, penalties, stop, failed)

    def _know(self, step: Step) -> None:
        """Learn what the ranks say of a step, and raise if training cannot go on."""
        report = self._totals.read()
        step.totals, step.own_loss, step.skipped = report.totals, report.own_loss, report.skipped
        if self._training.penalty is not None:
            step.extra["penalty"] = report.penalty
        self._judge.look_at(step)

    def _update(self, step: Step, skip: Tensor | None = None) -> None:
        """Change the weights by the gradients, unless these are not finite."""
        training = self._training
        step.rate = float(training.schedule.get_last_lr()[0])
        clip_norm = training.config.optim.clip_norm
        skipped = take_step(training.optimizer, training.scaler, clip_norm, skip)
        self._totals.note_skip(skipped)
        if skip is None:
            step.skipped = bool(skipped)

    def _know_update(self, step: Step) -> None:
        """Raise if the step was skipped, and training cannot go on."""
        if step.skipped:
            self._judge.look_at_skip(step)

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
        if len(samples) == 0 and not isinstance(self._training.config.norm, SYNCHRONIZED):
            return _Evaluating(self._training.replica)
        return nullcontext()

    def _no_sync_unless(self, last: bool) -> Any:
        return nullcontext() if last else self._training.replica.no_sync()


class _Evaluating:
    """A context in which the layers of a model are in evaluation mode, and the model is not.

    Layers are what has buffers of its own, or no parts. The rest stays as it is: a model that has
    auxiliary outputs in training gives them for no samples too, or DDP would wait for the gradients
    of their heads on the other ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            each
            for each in module.modules()
            if each.training and (each._buffers or not each._modules)  # pyright: ignore[reportPrivateUsage] -- its own ones alone
        ]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.training = False

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.training = True
