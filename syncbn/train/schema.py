"""What may be configured: one dataclass for each file of conf/, with its types and ranges."""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

# The schemas are not frozen: OmegaConf makes frozen ones read-only and refuses every override.
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class Device(Enum):
    """Where replicas compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    """Whether wandb writes to disk alone, to its server, or not at all."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


class Precision(Enum):
    """What autocast computes in; weights, statistics and losses stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Shares(Enum):
    """Which of the training samples a replica sees."""

    mixed = "mixed"
    by_class = "by_class"


class WhiteningMethod(Enum):
    """How the inverse root of a covariance is found."""

    zca = "zca"
    newton = "newton"


@dataclass(kw_only=True)
class DataConfig:
    """A data set: see conf/data."""

    name: str
    batch_size: PositiveInt
    workers: NonNegativeInt
    shares: Shares = Shares.mixed


@dataclass(kw_only=True)
class DigitsConfig(DataConfig):
    """conf/data/digits.yaml."""

    name: str = "digits"


@dataclass(kw_only=True)
class AugmentedConfig(DataConfig):
    """Images in memory, of which training sees random crops and mirror images."""

    path: str
    crop_padding: NonNegativeInt
    flip: bool


@dataclass(kw_only=True)
class CifarConfig(AugmentedConfig):
    """conf/data/cifar10.yaml."""

    name: str = "cifar10"


@dataclass(kw_only=True)
class MnistConfig(AugmentedConfig):
    """conf/data/mnist.yaml."""

    name: str = "mnist"


@dataclass(kw_only=True)
class FashionMnistConfig(AugmentedConfig):
    """conf/data/fashion_mnist.yaml."""

    name: str = "fashion_mnist"


@dataclass(kw_only=True)
class FolderConfig(DataConfig):
    """conf/data/folder.yaml."""

    name: str = "folder"
    path: str
    size: PositiveInt
    flip: bool
    crop_scale_min: Share


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    """conf/data/synthetic.yaml."""

    name: str = "synthetic"
    samples: PositiveInt
    test_samples: PositiveInt
    channels: PositiveInt
    size: PositiveInt
    classes: PositiveInt


@dataclass(kw_only=True)
class CustomDataConfig(DataConfig):
    """conf/data/custom.yaml."""

    name: str = "custom"
    factory: Factory
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class ModelConfig:
    """A model: see conf/model."""

    name: str


@dataclass(kw_only=True)
class CnnConfig(ModelConfig):
    """conf/model/cnn.yaml."""

    name: str = "cnn"
    width: PositiveInt


@dataclass(kw_only=True)
class MlpConfig(ModelConfig):
    """conf/model/mlp.yaml."""

    name: str = "mlp"
    size: PositiveInt
    width: PositiveInt
    depth: PositiveInt


@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    """conf/model/torchvision.yaml."""

    name: str = "torchvision"
    architecture: str
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class CustomModelConfig(ModelConfig):
    """conf/model/custom.yaml."""

    name: str = "custom"
    factory: Factory
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class NormConfig:
    """A normalization: see conf/norm."""

    name: str


@dataclass(kw_only=True)
class NoNormConfig(NormConfig):
    """conf/norm/none.yaml."""

    name: str = "none"


@dataclass(kw_only=True)
class LocalNormConfig(NormConfig):
    """conf/norm/local.yaml."""

    name: str = "local"
    eps: PositiveFloat
    momentum: Share


@dataclass(kw_only=True)
class SyncNormConfig(LocalNormConfig):
    """conf/norm/sync.yaml."""

    name: str = "sync"


@dataclass(kw_only=True)
class WhiteningNormConfig(NormConfig):
    """conf/norm/whitening.yaml."""

    name: str = "whitening"
    eps: PositiveFloat
    momentum: Share
    group_size: PositiveInt
    method: WhiteningMethod
    iterations: PositiveInt
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None


# Whose running statistics are the same on all ranks, and change with no empty share.
SYNCHRONISED = (SyncNormConfig, WhiteningNormConfig)


@dataclass(kw_only=True)
class PenaltyNormConfig(NormConfig):
    """conf/norm/penalty.yaml."""

    name: str = "penalty"
    strength: NonNegativeFloat


@dataclass(kw_only=True)
class RenormalizeNormConfig(NormConfig):
    """conf/norm/renormalize.yaml."""

    name: str = "renormalize"
    eps: PositiveFloat


@dataclass(kw_only=True)
class OptimConfig:
    """An optimizer: see conf/optim."""

    name: str
    lr: PositiveFloat
    accumulate: PositiveInt
    clip_norm: PositiveFloat | None
    label_smoothing: BelowOne
    ema_decay: BelowOne | None


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


@dataclass(kw_only=True)
class NumericsConfig:
    """How a step is computed."""

    precision: Precision
    channels_last: bool
    compile: bool
    deterministic: bool


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the state is written, and how much of it is kept."""

    every_steps: PositiveInt | None
    keep: PositiveInt


@dataclass(kw_only=True)
class LaunchConfig:
    """Which processes train: see conf/launch."""

    name: str = "local"
    nproc: PositiveInt
    threads: PositiveInt | None
    device: Device
    ranks_per_gpu: PositiveInt = 1
    max_restarts: NonNegativeInt
    timeout_s: PositiveFloat
    stop_timeout_s: PositiveFloat


@dataclass(kw_only=True)
class TrackConfig:
    """Who is told about the run: see conf/track."""

    name: str


@dataclass(kw_only=True)
class NoTrackConfig(TrackConfig):
    """conf/track/none.yaml."""

    name: str = "none"


@dataclass(kw_only=True)
class WandbConfig(TrackConfig):
    """conf/track/wandb.yaml."""

    name: str = "wandb"
    project: Annotated[str, Field(min_length=1)]
    mode: WandbMode
    group: str | None


@dataclass(kw_only=True)
class TrainConfig:
    """A whole job: see conf/config.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: PositiveInt
    max_steps: PositiveInt | None
    log_every_steps: PositiveInt
    recalibrate: bool
    run_root: str
    run_dir: str | None
    sweep_dir: str | None
    publish: Annotated[str, Field(min_length=1)] | None
    data: DataConfig
    model: ModelConfig
    norm: NormConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    numerics: NumericsConfig
    checkpoint: CheckpointConfig
    launch: LaunchConfig
    track: TrackConfig


# Where a run lies, and where its model goes, is no part of what it trains.
PLACES = ("run_root", "run_dir", "sweep_dir", "publish")

CHOICES: Mapping[str, tuple[type[Any], ...]] = {
    "data": (
        DigitsConfig,
        CifarConfig,
        MnistConfig,
        FashionMnistConfig,
        FolderConfig,
        SyntheticConfig,
        CustomDataConfig,
    ),
    "model": (CnnConfig, MlpConfig, TorchvisionConfig, CustomModelConfig),
    "norm": (
        SyncNormConfig,
        LocalNormConfig,
        NoNormConfig,
        WhiteningNormConfig,
        PenaltyNormConfig,
        RenormalizeNormConfig,
    ),
    "optim": (SgdConfig, AdamWConfig, TorchOptimConfig),
    "schedule": (CosineConfig, StepConfig, OneCycleConfig, ConstantConfig),
    "launch": (LaunchConfig,),
    "track": (WandbConfig, NoTrackConfig),
}

# What has no choices, but ranges.
SECTIONS: Mapping[str, tuple[type[Any], ...]] = {
    "numerics": (NumericsConfig,),
    "checkpoint": (CheckpointConfig,),
}


def schemas(group: str) -> dict[str, type[Any]]:
    """Return the schemas of a group of conf/ by the name that each has as its default."""
    return {schema.name: schema for schema in CHOICES[group]}
