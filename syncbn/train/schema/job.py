"""What may be configured of processes, numerics, checkpoints and trackers.

conf/launch, conf/track, and sections of conf/config.yaml.
"""

from enum import Enum
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import Processes, Seconds


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


@dataclass(kw_only=True)
class NumericsConfig:
    """How a step is computed."""

    precision: Precision
    channels_last: bool
    compile: bool
    deterministic: bool
    max_skipped_steps: PositiveInt = 50


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the state is written, and how much of it is kept."""

    every_steps: PositiveInt | None
    keep: PositiveInt


@dataclass(kw_only=True)
class LaunchConfig:
    """Which processes train: see conf/launch."""

    name: str = "local"
    nproc: Processes
    threads: Processes | None
    device: Device
    ranks_per_gpu: PositiveInt = 1
    max_restarts: NonNegativeInt
    timeout_s: Seconds
    stop_timeout_s: Seconds
    load_timeout_s: Seconds = 1800.0
    find_unused_parameters: bool = False


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
