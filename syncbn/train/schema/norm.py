"""What may be configured of normalization: conf/norm."""

from enum import Enum
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import Share


class WhiteningMethod(Enum):
    """How the inverse root of a covariance is found."""

    zca = "zca"
    newton = "newton"


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
    eps: PositiveFloat | None
    momentum: Share | None


@dataclass(kw_only=True)
class SyncNormConfig(LocalNormConfig):
    """conf/norm/sync.yaml."""

    name: str = "sync"


@dataclass(kw_only=True)
class WhiteningNormConfig(NormConfig):
    """conf/norm/whitening.yaml."""

    name: str = "whitening"
    eps: PositiveFloat | None
    momentum: Share | None
    group_size: PositiveInt
    method: WhiteningMethod
    iterations: PositiveInt
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None


# Whose running statistics are the same on all ranks, and change with no empty share.
SYNCHRONIZED = (SyncNormConfig, WhiteningNormConfig)


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
