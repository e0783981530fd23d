"""Learning-rate schedules: one closed form each, of where a run is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from syncbn.train.schema import (
    CosineConfig,
    OneCycleConfig,
    ScheduleConfig,
    StepConfig,
    WarmupConfig,
)

# Of one_cycle, as torch has them: the highest rate over the first, and the first over the last.
_START_DIVISOR = 25
_END_DIVISOR = 1e4
# Positions in epochs are sums of fractions of whole steps; this is far less than a step.
_ROUNDING = 1e-9

Plan = tuple[int, int | None]


@dataclass(frozen=True)
class Place:
    """Where in a run a step is.

    Attributes:
        step: how many steps were made before it.
        share: the part of the run that is done before it, from 0 to 1.
        step_share: the part of the run that the step is.
        epoch: how many passes over the data are done before it.
        warmup_steps: how many steps the rate rises.
        warmup_share: the part of the run in which it rises.
    """

    step: int
    share: float
    step_share: float
    epoch: float
    warmup_steps: int
    warmup_share: float


def factor(config: ScheduleConfig, place: Place) -> float:
    """Return what a schedule multiplies the configured rate by.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts (cosine); Smith and
    Topin, "Super-Convergence" (2018), with the values of `torch.optim.lr_scheduler.OneCycleLR`
    (one_cycle).
    """
    if isinstance(config, OneCycleConfig):
        return _one_cycle(config.rise, place)
    rise = min(1.0, (place.step + 1) / (place.warmup_steps + 1))
    match config:
        case CosineConfig() if place.step >= place.warmup_steps:
            done = (place.share - place.warmup_share) / max(1 - place.warmup_share, _ROUNDING)
            return _half_cosine(1, 0, done)
        case StepConfig():
            return rise * config.factor ** math.floor(place.epoch / config.every_epochs + _ROUNDING)
        case _:
            return rise


def _one_cycle(rise: float, place: Place) -> float:
    # The rate is highest one step before `rise` is done, and lowest in the run's last step.
    peak = rise - place.step_share
    start = 1 / _START_DIVISOR
    if peak > 0 and place.share <= peak:
        return _half_cosine(start, 1, place.share / peak)
    return _half_cosine(1, start / _END_DIVISOR, (place.share - peak) / (1 - rise))


def _half_cosine(start: float, end: float, done: float) -> float:
    """Return the value between start and end, along half a cosine, of which a share is done."""
    done = min(1.0, max(0.0, done))
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def share_done(step: int, total_steps: int, steps_per_epoch: int, epoch: float) -> float:
    """Return which part of a run is done, in samples, if it goes on as it is planned now.

    Args:
        step: how many steps were made.
        total_steps: how many there will have been at the end.
        steps_per_epoch: how many a pass over the data takes now.
        epoch: how many passes are done.
    """
    left = max(0, total_steps - step) / steps_per_epoch
    return epoch / (epoch + left) if epoch + left > 0 else 0.0


class Schedule:
    """Sets the learning rates of an optimizer by where the run is.

    The rates before this schedule are the highest ones; each parameter group keeps its own. After
    each optimizer step, call `step`. What a checkpoint holds of a schedule is the position alone,
    so a run may go on with another rate.

    How the loop resumes a run. The optimizer's state comes first, because it holds rates too:

        optimizer.load_state_dict(states["optimizer"])
        schedule.load_state_dict(states["schedule"])
        schedule.resume_at(step=…, total_steps=…, steps_per_epoch=…, epoch=…)

    `resume_at` changes nothing if the number of steps and the plan are what they were, so it may be
    called at each resume. With another number of ranks, the rate goes on from the share of the run
    that is done. With another plan (more epochs, another max_steps), it is the rate that the new
    plan has at this share. Either way, the last step is the schedule's last.

    Args:
        optimizer: whose rates are set, at once to those of the first step.
        config: the kind of schedule.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the data.
        plan: epochs and max_steps, by which a resumed run knows whether it was planned otherwise.

    Attributes:
        made: the rates of the last step that was made, by parameter group; before the first step,
            those of the first.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: ScheduleConfig,
        total_steps: int,
        steps_per_epoch: int,
        plan: Plan | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._config = config
        self._base = [float(group["lr"]) for group in optimizer.param_groups]
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._plan = plan
        # Of the checkpoint that was read; an earlier version noted neither plan nor position.
        self._planned, self._noted = plan, True
        self._start(0, 0.0, 0.0)
        self._warmup_steps = self._allowed_warmup()
        self._warmup_share = self._warmup_steps / total_steps
        self.made: list[float] = []
        self.apply()
        self.made = self.get_last_lr()

    def _start(self, step: int, share: float, epoch: float) -> None:
        """Note a position from which the rest of the run goes evenly to its end."""
        self._step = step
        self._from_step, self._from_share, self._from_epoch = step, share, epoch

    def _allowed_warmup(self) -> int:
        """Return over how many steps the rate rises: the highest one is reached in any case."""
        steps = self._config.warmup_steps if isinstance(self._config, WarmupConfig) else 0
        return max(0, min(steps, self._total_steps - 1))

    @property
    def steps(self) -> int:
        """How many steps were made by it; those that left the weights alone are not among them."""
        return self._step

    @property
    def place(self) -> Place:
        """Where the next step is."""
        return Place(
            self._step,
            min(1.0, self._share_at(self._step)),
            (1 - self._from_share) / max(1, self._total_steps - self._from_step),
            self._from_epoch + (self._step - self._from_step) / self._steps_per_epoch,
            self._warmup_steps,
            self._warmup_share,
        )

    def get_last_lr(self) -> list[float]:
        """Return the rates of the next step, by parameter group; torch's name for them."""
        now = factor(self._config, self.place)
        return [base * now for base in self._base]

    def step(self) -> None:
        """Note that a step was made, and set the rates of the next one."""
        self.made = self.get_last_lr()
        self._step += 1
        self.apply()

    def apply(self) -> None:
        """Set the optimizer's rates to those of the next step."""
        for group, rate in zip(self._optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain numbers."""
        return {
            "step": self._step,
            "from_step": self._from_step,
            "from_share": self._from_share,
            "from_epoch": self._from_epoch,
            "total_steps": self._total_steps,
            "steps_per_epoch": self._steps_per_epoch,
            "warmup_steps": self._warmup_steps,
            "warmup_share": self._warmup_share,
            "plan": None if self._plan is None else list(self._plan),
            "made": list(self.made),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to the position that `state_dict` gave, and set the rates that it has.

        Args:
            state: what `state_dict` gave; or, from a checkpoint of an earlier version, the state of
                one of torch's schedulers, of which the number of steps is taken. If that run was
                not as long as this one is planned, call `resume_at` next.
        """
        if "from_step" not in state:
            self._noted = False
            self._step = max(0, int(state["last_epoch"]) - 1)
            self.made = self.get_last_lr()
            self._step = int(state["last_epoch"])
            self.apply()
            return
        plan = state["plan"]
        self._noted = True
        self._planned = None if plan is None else (int(plan[0]), plan[1])
        self._step, self._from_step = int(state["step"]), int(state["from_step"])
        self._from_share = float(state["from_share"])
        self._from_epoch = float(state["from_epoch"])
        self._total_steps = int(state["total_steps"])
        self._steps_per_epoch = int(state["steps_per_epoch"])
        self._warmup_steps = int(state["warmup_steps"])
        self._warmup_share = float(state["warmup_share"])
        self.made = [float(rate) for rate in state["made"]]
        self.apply()

    def resume_at(
        self,
        *,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        epoch: float,
        share: float | None = None,
    ) -> None:
        """Go on with the rest of a run, which may be planned otherwise than it was.

        Args:
            step: how many steps were made.
            total_steps: how many there will have been at the end.
            steps_per_epoch: how many a pass over the data takes from now on.
            epoch: how many passes are done, as `k + 1 - left / steps_per_epoch` within the pass
                after k whole ones, of which `left` steps are left.
            share: which part of the run is done; None: the one that the schedule has noted, or, if
                the plan has changed or is not known, what `share_done` returns.
        """
        numbers = (step, total_steps, steps_per_epoch)
        if self._noted and numbers == (self._step, self._total_steps, self._steps_per_epoch):
            self.apply()
            return
        was = self.place
        if share is None:
            kept = self._noted and self._planned == self._plan
            share = was.share if kept else share_done(step, total_steps, steps_per_epoch, epoch)
        share = min(1.0, max(0.0, share))
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._start(step, share, epoch)
        if not self._noted or step < self._warmup_steps:
            self._warmup_steps = self._allowed_warmup()
            self._warmup_share = self._share_at(self._warmup_steps)
        elif was.share > 0:  # the rise is over, and keeps its part of what is done
            self._warmup_share *= share / was.share
        self._planned, self._noted = self._plan, True
        self.apply()

    def _share_at(self, step: int) -> float:
        """Return the part of the run that is done before a step, one before the resume too."""
        if step < self._from_step:
            return self._from_share * step / self._from_step
        left = max(1, self._total_steps - self._from_step)
        return self._from_share + (1 - self._from_share) * (step - self._from_step) / left
