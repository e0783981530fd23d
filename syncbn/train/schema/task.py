"""What may be configured of tasks: conf/task."""

from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import Factory


@dataclass(kw_only=True)
class TaskConfig:
    """What is learned: see conf/task."""

    name: str


@dataclass(kw_only=True)
class ClassificationConfig(TaskConfig):
    """conf/task/classification.yaml."""

    name: str = "classification"
    class_weights: list[PositiveFloat] | None = None
    loss: Factory | None = None


@dataclass(kw_only=True)
class SegmentationConfig(TaskConfig):
    """conf/task/segmentation.yaml."""

    name: str = "segmentation"
    class_weights: list[PositiveFloat] | None = None
    loss: Factory | None = None
    ignore_index: Annotated[int, Field(ge=0, le=255)]
    dice: NonNegativeFloat
    auxiliary: NonNegativeFloat


@dataclass(kw_only=True)
class CustomTaskConfig(TaskConfig):
    """conf/task/custom.yaml."""

    name: str = "custom"
    factory: Factory
    arguments: dict[str, Any]
