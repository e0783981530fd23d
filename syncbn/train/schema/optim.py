"""What may be configured of optimizers and schedules: conf/optim and conf/schedule."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import BelowOne, Share


@dataclass(kw_only=True)
class OptimConfig:
    """An optimizer: see conf/optim.

    The defaults are what a configuration meant before it had these keys.
    """

    name: str
    lr: PositiveFloat
    accumulate: PositiveInt
    clip_norm: PositiveFloat | None
    label_smoothing: BelowOne
    ema_decay: BelowOne | None
    ema_warmup: bool = False
    freeze: list[str] = field(default_factory=list[str])
    lr_scale: dict[str, PositiveFloat] = field(default_factory=dict[str, float])
    decay_all: bool = True


@dataclass(kw_only=True)
class SgdConfig(OptimConfig):
    """conf/optim/sgd.yaml."""

    name: str = "sgd"
    momentum: BelowOne
    weight_decay: NonNegativeFloat


@dataclass(kw_only=True)
class AdamWConfig(OptimConfig):
    """conf/optim/adamw.yaml."""

    name: str = "adamw"
    weight_decay: NonNegativeFloat


@dataclass(kw_only=True)
class TorchOptimConfig(OptimConfig):
    """conf/optim/torch.yaml."""

    name: str = "torch"
    optimizer: str
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class ScheduleConfig:
    """A learning-rate schedule: see conf/schedule."""

    name: str


@dataclass(kw_only=True)
class WarmupConfig(ScheduleConfig):
    """A schedule that begins with a linear rise."""

    warmup_steps: NonNegativeInt


@dataclass(kw_only=True)
class ConstantConfig(WarmupConfig):
    """conf/schedule/constant.yaml."""

    name: str = "constant"


@dataclass(kw_only=True)
class CosineConfig(WarmupConfig):
    """conf/schedule/cosine.yaml."""

    name: str = "cosine"


@dataclass(kw_only=True)
class StepConfig(WarmupConfig):
    """conf/schedule/step.yaml."""

    name: str = "step"
    every_epochs: PositiveInt
    factor: Share


@dataclass(kw_only=True)
class OneCycleConfig(ScheduleConfig):
    """conf/schedule/one_cycle.yaml."""

    name: str = "one_cycle"
    rise: Annotated[float, Field(gt=0, lt=1)]
