"""What may be configured of models: conf/model."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import Factory


@dataclass(kw_only=True)
class ModelConfig:
    """A model: see conf/model.

    The defaults are what a configuration meant before it had these keys.
    """

    name: str
    weights: Annotated[str, Field(min_length=1)] | None = None
    weights_into: str | None = None
    weights_strict: bool = True


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
class UnetConfig(ModelConfig):
    """conf/model/unet.yaml."""

    name: str = "unet"
    width: PositiveInt
    depth: PositiveInt
    encoder: Annotated[str, Field(pattern=r"^timm\.\w+$")] | None


@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    """conf/model/torchvision.yaml."""

    name: str = "torchvision"
    architecture: str
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class TimmConfig(ModelConfig):
    """conf/model/timm.yaml."""

    name: str = "timm"
    architecture: str
    arguments: dict[str, Any]


@dataclass(kw_only=True)
class CustomModelConfig(ModelConfig):
    """conf/model/custom.yaml."""

    name: str = "custom"
    factory: Factory
    arguments: dict[str, Any]
