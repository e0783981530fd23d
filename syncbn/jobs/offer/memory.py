"""How much memory a job may take, estimated from its configuration, before it takes any.

No single number of a configuration decides it, but products of several do. The estimate is for
refusing what would take a machine down, and may be wrong by a factor of a few.
"""

from dataclasses import dataclass

from syncbn.train.schema import (
    AugmentedConfig,
    CifarConfig,
    CnnConfig,
    DataConfig,
    DigitScenesConfig,
    DigitsConfig,
    FolderConfig,
    MaskFilesConfig,
    MlpConfig,
    SegmentationConfig,
    SyntheticConfig,
    TorchvisionConfig,
    TrainConfig,
    UnetConfig,
)

_PROCESS_BYTES = 300_000_000  # torch and its libraries
_FLOAT_BYTES = 4
_STATES = 4  # weights, gradients, and two moving averages of an optimizer
_LABEL_BYTES = 8
_PREFETCHED = 2  # batches of each process that prepares some

# Parameters of torchvision's models, in millions, for 1000 classes; of those that have more than
# _MOST_MILLIONS.
LARGE_MILLIONS = {
    "regnet_y_128gf": 645,
    "vit_h_14": 633,
    "vit_l_32": 307,
    "vit_l_16": 305,
    "convnext_large": 198,
    "regnet_y_32gf": 146,
    "vgg19_bn": 144,
    "vgg19": 144,
    "vgg16_bn": 139,
    "vgg16": 139,
    "vgg13_bn": 134,
    "vgg13": 134,
    "vgg11_bn": 133,
    "vgg11": 133,
    "wide_resnet101_2": 127,
    "efficientnet_v2_l": 119,
    "regnet_x_32gf": 108,
}
MOST_MILLIONS = 90  # of the others, and of models that the administrator defines
_MILLION = 10**6
# What a step keeps for its backward pass, for each pixel of an image: of models of about 50 layers.
_KEPT_OF_A_PIXEL = 256


@dataclass(frozen=True)
class Shape:
    """What the samples of a data set look like."""

    channels: int
    height: int
    width: int
    classes: int

    @property
    def values(self) -> int:
        """The numbers of one sample."""
        return self.channels * self.height * self.width


def job_bytes(config: TrainConfig) -> int:
    """Return about how much memory all replicas of a job take."""
    shape = sample_shape(config.data)
    kept = _kept_values(config, shape)
    batches = 2 + _PREFETCHED * config.data.workers
    values = (
        _STATES * parameters(config, shape)
        + config.data.batch_size * kept
        + config.data.batch_size * batches * shape.values
    )
    replica = _PROCESS_BYTES * (1 + config.data.workers) + _FLOAT_BYTES * values
    return config.launch.nproc * (replica + _stored_bytes(config.data, shape))


def sample_shape(data: DataConfig) -> Shape:
    """Return the shape of samples; of an administrator's own data, an ordinary one."""
    match data:
        case DigitsConfig():
            return Shape(1, 8, 8, 10)
        case CifarConfig():
            return Shape(3, 32, 32, 10)
        case AugmentedConfig():
            return Shape(1, 28, 28, 10)
        case FolderConfig():
            return Shape(3, data.size, data.size, 1000)
        case MaskFilesConfig():
            return Shape(3, data.height, data.width, 32)
        case DigitScenesConfig():
            return Shape(3, data.size, data.size, 11)
        case SyntheticConfig():
            return Shape(data.channels, data.size, data.size, data.classes)
        case _:
            return Shape(3, 224, 224, 1000)


def parameters(config: TrainConfig, shape: Shape) -> int:
    """Return how many parameters a model has: exactly for ours, roughly for others."""
    match config.model:
        case MlpConfig(size=size, width=width, depth=depth):
            inner = (depth - 1) * width + 2 * depth
            return width * (shape.channels * size**2 + inner + shape.classes) + shape.classes
        case CnnConfig(width=width):
            convolutions = 9 * width * (shape.channels + 2 * width + 4 * width + 4 * width)
            return convolutions + 14 * width + (2 * width + 1) * shape.classes
        case UnetConfig(width=width, depth=depth, encoder=None):
            return _unet_parameters(shape, width, depth)
        case TorchvisionConfig(architecture=name):
            return LARGE_MILLIONS.get(name, MOST_MILLIONS) * _MILLION
        case _:
            return MOST_MILLIONS * _MILLION


def _unet_parameters(shape: Shape, width: int, depth: int) -> int:
    channels = [width * 2**level for level in range(depth + 1)]

    def level(before: int, after: int) -> int:
        return 9 * after * (before + after) + 4 * after

    encoder = sum(map(level, [shape.channels, *channels], channels))
    decoder = sum(level(channels[at + 1] + channels[at], channels[at]) for at in range(depth))
    return encoder + decoder + (width + 1) * shape.classes


def _kept_values(config: TrainConfig, shape: Shape) -> int:
    """Return how many numbers a step keeps for the backward pass of one sample."""
    pixels = shape.height * shape.width
    match config.model:
        case MlpConfig():
            kept = shape.values + 3 * config.model.width * config.model.depth
        case CnnConfig():
            kept = 5 * config.model.width * pixels
        case UnetConfig():
            kept = 26 * config.model.width * pixels
        case _:
            kept = _KEPT_OF_A_PIXEL * pixels
    answers = 4 * shape.classes
    return kept + answers * (pixels if isinstance(config.task, SegmentationConfig) else 1)


def _stored_bytes(data: DataConfig, shape: Shape) -> int:
    """Return what a replica holds of samples that are made and not read."""
    match data:
        case SyntheticConfig():
            samples = data.samples + data.test_samples + data.classes
            return samples * (shape.values + _LABEL_BYTES)
        case DigitScenesConfig():
            samples = data.samples + data.test_samples
            return samples * (shape.values + shape.height * shape.width)
        case _:
            return 0
