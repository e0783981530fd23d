"""What may be configured of data: conf/data."""

from enum import Enum
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from syncbn.train.schema.types import BelowOne, Factory, Scale, Share


class Shares(Enum):
    """Which of the training samples a replica sees."""

    mixed = "mixed"
    by_class = "by_class"


@dataclass(kw_only=True)
class DataConfig:
    """A data set: see conf/data."""

    name: str
    batch_size: PositiveInt
    workers: NonNegativeInt
    shares: Shares = Shares.mixed
    # Not conf's default, for the configurations of runs from before there was a validation split.
    validation: BelowOne = 0.0
    drop_last: bool = False
    balanced: bool = False


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
    skip_damaged: bool = False


@dataclass(kw_only=True)
class MaskedConfig(DataConfig):
    """Images with masks, which training sees scaled, cropped and mirrored together."""

    flip: bool
    scale_min: Scale
    scale_max: Scale


@dataclass(kw_only=True)
class MaskFilesConfig(MaskedConfig):
    """Images with masks in files, which are brought to one size."""

    path: str
    height: PositiveInt
    width: PositiveInt
    skip_damaged: bool


@dataclass(kw_only=True)
class MasksConfig(MaskFilesConfig):
    """conf/data/masks.yaml."""

    name: str = "masks"


@dataclass(kw_only=True)
class VocConfig(MaskFilesConfig):
    """conf/data/voc.yaml."""

    name: str = "voc"


@dataclass(kw_only=True)
class CityscapesConfig(MaskFilesConfig):
    """conf/data/cityscapes.yaml."""

    name: str = "cityscapes"


@dataclass(kw_only=True)
class PetsConfig(MaskFilesConfig):
    """conf/data/pets.yaml."""

    name: str = "pets"


@dataclass(kw_only=True)
class DigitScenesConfig(MaskedConfig):
    """conf/data/digit_scenes.yaml."""

    name: str = "digit_scenes"
    samples: PositiveInt
    test_samples: PositiveInt
    size: PositiveInt


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
