"""What may be configured: one dataclass for each file of conf/, with its types and ranges.

The schemas are not frozen: OmegaConf makes frozen ones read-only and refuses every override.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.data import (
    AugmentedConfig,
    CifarConfig,
    CityscapesConfig,
    CustomDataConfig,
    DataConfig,
    DigitScenesConfig,
    DigitsConfig,
    FashionMnistConfig,
    FolderConfig,
    MaskedConfig,
    MaskFilesConfig,
    MasksConfig,
    MnistConfig,
    PetsConfig,
    Shares,
    SyntheticConfig,
    VocConfig,
)
from syncbn.train.schema.job import (
    CheckpointConfig,
    Device,
    LaunchConfig,
    NoTrackConfig,
    NumericsConfig,
    Precision,
    TrackConfig,
    WandbConfig,
    WandbMode,
)
from syncbn.train.schema.model import (
    CnnConfig,
    CustomModelConfig,
    MlpConfig,
    ModelConfig,
    TimmConfig,
    TorchvisionConfig,
    UnetConfig,
)
from syncbn.train.schema.norm import (
    SYNCHRONIZED,
    LocalNormConfig,
    NoNormConfig,
    NormConfig,
    PenaltyNormConfig,
    RenormalizeNormConfig,
    SyncNormConfig,
    WhiteningMethod,
    WhiteningNormConfig,
)
from syncbn.train.schema.optim import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    OneCycleConfig,
    OptimConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
    TorchOptimConfig,
    WarmupConfig,
)
from syncbn.train.schema.task import (
    ClassificationConfig,
    CustomTaskConfig,
    SegmentationConfig,
    TaskConfig,
)

__all__ = [
    "CHOICES",
    "PLACES",
    "SECTIONS",
    "SYNCHRONIZED",
    "AdamWConfig",
    "AugmentedConfig",
    "CheckpointConfig",
    "CifarConfig",
    "CityscapesConfig",
    "ClassificationConfig",
    "CnnConfig",
    "ConstantConfig",
    "CosineConfig",
    "CustomDataConfig",
    "CustomModelConfig",
    "CustomTaskConfig",
    "DataConfig",
    "Device",
    "DigitScenesConfig",
    "DigitsConfig",
    "FashionMnistConfig",
    "FolderConfig",
    "LaunchConfig",
    "LocalNormConfig",
    "MaskFilesConfig",
    "MaskedConfig",
    "MasksConfig",
    "MlpConfig",
    "MnistConfig",
    "ModelConfig",
    "NoNormConfig",
    "NoTrackConfig",
    "NormConfig",
    "NumericsConfig",
    "OneCycleConfig",
    "OptimConfig",
    "PenaltyNormConfig",
    "PetsConfig",
    "Precision",
    "RenormalizeNormConfig",
    "ScheduleConfig",
    "SegmentationConfig",
    "SgdConfig",
    "Shares",
    "StepConfig",
    "SyncNormConfig",
    "SyntheticConfig",
    "TaskConfig",
    "TimmConfig",
    "TorchOptimConfig",
    "TorchvisionConfig",
    "TrackConfig",
    "TrainConfig",
    "UnetConfig",
    "VocConfig",
    "WandbConfig",
    "WandbMode",
    "WarmupConfig",
    "WhiteningMethod",
    "WhiteningNormConfig",
    "schemas",
]


@dataclass(kw_only=True)
class TrainConfig:
    """A whole job: see conf/config.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: PositiveInt
    max_steps: PositiveInt | None
    log_every_steps: PositiveInt
    recalibrate: bool
    patience: PositiveInt | None = None
    run_root: str
    run_dir: str | None
    sweep_dir: str | None
    publish: Annotated[str, Field(min_length=1)] | None
    task: TaskConfig
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
    "task": (ClassificationConfig, SegmentationConfig, CustomTaskConfig),
    "data": (
        DigitsConfig,
        CifarConfig,
        MnistConfig,
        FashionMnistConfig,
        FolderConfig,
        SyntheticConfig,
        DigitScenesConfig,
        MasksConfig,
        VocConfig,
        CityscapesConfig,
        PetsConfig,
        CustomDataConfig,
    ),
    "model": (CnnConfig, MlpConfig, UnetConfig, TorchvisionConfig, TimmConfig, CustomModelConfig),
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
