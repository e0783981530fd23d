"""Data sets by name, read as configured and checked."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.errors import ConfigError
from syncbn.train.data.checks import check_dataset, splits
from syncbn.train.data.dataset import IMAGENET, Dataset, image_input, standardizing
from syncbn.train.data.files import listed
from syncbn.train.data.folders import read_folder
from syncbn.train.data.images import TensorImages, load_digits, read_cifar, read_idx
from syncbn.train.data.sampling import Batch, labels_in_memory
from syncbn.train.data.segmentation import digit_scenes, masked_files
from syncbn.train.data.splits import Part, hold_out
from syncbn.train.generators import seed_alike
from syncbn.train.imports import imported
from syncbn.train.schema import (
    AugmentedConfig,
    CustomDataConfig,
    DataConfig,
    FolderConfig,
    MaskFilesConfig,
    SyntheticConfig,
)

Moves = Callable[[], None]

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load_dataset(
    config: DataConfig,
    seed: int,
    *,
    any_targets: bool = False,
    moves: Moves = lambda: None,
) -> Dataset:
    """Return the configured data set; reads local files, and never the network.

    The random generators of Python, NumPy and torch are seeded first, the same on every rank, so
    that what a function of the user's draws is the same on each and in each attempt at a run.

    Args:
        config: which data set, and which share of its training samples validates if it has no
            validation samples of its own.
        seed: decides that share, the random changes of training samples, and what is drawn.
        any_targets: whether targets may be other tensors than labels and masks.
        moves: is called from time to time while all files are read, as `data.skip_damaged` asks.

    Raises:
        ConfigError: its files are missing or damaged, the user's own function fails, or its parts
            do not fit each other.
    """
    seed_alike(seed)
    dataset = DATASETS[config.name](config, seed, moves)
    match config:
        case CustomDataConfig():
            where = f"data.factory={config.factory}"
        case AugmentedConfig() | FolderConfig() | MaskFilesConfig():
            where = f"data.path={config.path}"
        case _:
            where = f"data={config.name}"
    if getattr(config, "skip_damaged", False):
        dataset = _without_damaged(dataset, where, moves)
    check_dataset(dataset, where, any_targets)
    if dataset.validation is None and config.validation > 0:
        train, validation = hold_out(dataset.train, config.validation, seed)
        dataset = replace(dataset, train=train, validation=validation)
    return dataset


def _without_damaged(dataset: Dataset, where: str, moves: Moves) -> Dataset:
    """Return a data set of files without those that cannot be read."""
    kept: dict[str, Any] = {}
    for name, samples in splits(dataset).items():
        files: Any = samples
        kept[name] = files.without_damaged(moves)
    before, after = (labels_in_memory(each) for each in (dataset.train, kept["train"]))
    if before is not None and after is not None:
        lost = set(before.tolist()) - set(after.tolist())
        if lost:
            names = listed([dataset.classes[label] for label in sorted(lost)])
            raise ConfigError(
                f"{where}: no training image of {names} can be read; repair one at least, or "
                "remove the class"
            )
    return replace(dataset, **kept)


def digits(validation: float = 0.0, seed: int = 0) -> Dataset:
    """Return scikit-learn's handwritten digits: 1437 training and 360 test images, 1×8×8, 0 to 16.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998).

    Args:
        validation: the share of the 1437 that validates instead; 0: none.
        seed: decides which of them.
    """
    images, test = load_digits()
    train, held_out = hold_out(images, validation, seed)
    scale = 1 / 16
    seen = images.samples[train.indices] if isinstance(train, Part) else images.samples
    return Dataset(
        train=train,
        test=test,
        classes=tuple(str(digit) for digit in range(10)),
        input=image_input(images.samples),
        preprocessing=Preprocessing(
            scale=scale,
            mean=(seen.mul(scale).mean().item(),),
            std=(seen.mul(scale).std().item(),),
        ),
        validation=held_out,
    )


def _digits(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    return digits(config.validation, seed)


def _cifar10(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    """Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009)."""
    assert isinstance(config, AugmentedConfig)
    train, test, classes = read_cifar(config.path)
    return _of_bytes(config, seed, _augmented(config, seed, train), TensorImages(*test), classes)


def _mnist(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    """Source: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning …" (1998)."""
    assert isinstance(config, AugmentedConfig)
    how = (
        "train-images-idx3-ubyte.gz and the three others of "
        "https://github.com/cvdfoundation/mnist, or another mirror"
    )
    train, test = read_idx(config.path, how)
    classes = tuple(str(digit) for digit in range(10))
    return _of_bytes(config, seed, _augmented(config, seed, train), TensorImages(*test), classes)


def _fashion_mnist(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    """Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST" (2017)."""
    assert isinstance(config, AugmentedConfig)
    how = (
        "Debian's package dataset-fashion-mnist, or the four files of "
        "https://github.com/zalandoresearch/fashion-mnist"
    )
    train, test = read_idx(config.path, how)
    return _of_bytes(
        config, seed, _augmented(config, seed, train), TensorImages(*test), FASHION_CLASSES
    )


def _folder(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    assert isinstance(config, FolderConfig)
    found, classes = read_folder(config, seed)
    return Dataset(
        train=found["train"],
        test=found.get("test"),
        validation=found.get("val"),
        classes=classes,
        input=InputSpec(name="image", shape=(3, config.size, config.size), dtype="float32"),
        preprocessing=IMAGENET,
    )


def _synthetic(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    """Return noise over one pattern a class."""
    assert isinstance(config, SyntheticConfig)
    chance = np.random.default_rng(0)
    shape = (config.channels, config.size, config.size)
    # In bytes throughout, as benchmarks ask for gigabytes; no sum exceeds 79 + 175.
    patterns = chance.integers(0, 80, (config.classes, *shape), dtype=np.uint8)

    def split(count: int) -> TensorImages:
        images = chance.integers(0, 176, (count, *shape), dtype=np.uint8)
        for label, pattern in enumerate(patterns):
            images[label :: config.classes] += pattern
        return TensorImages(torch.from_numpy(images), torch.arange(count) % config.classes)

    train, test = split(config.samples), split(config.test_samples)
    classes = tuple(str(number) for number in range(config.classes))
    return _of_bytes(config, seed, train, test, classes)


def _custom(config: DataConfig, seed: int, moves: Moves) -> Dataset:
    assert isinstance(config, CustomDataConfig)
    what = "a function that returns a syncbn.train.data.Dataset"
    factory = imported(config.factory, "data.factory", what)
    try:
        dataset = factory(**config.arguments)
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"data.factory={config.factory} failed with data.arguments={config.arguments}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.factory={config.factory} returned a {type(dataset).__name__}; it must return a "
            "syncbn.train.data.Dataset"
        )
    return dataset


DATASETS: Mapping[str, Callable[[DataConfig, int, Moves], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "synthetic": _synthetic,
    "digit_scenes": digit_scenes,
    "masks": masked_files,
    "voc": masked_files,
    "cityscapes": masked_files,
    "pets": masked_files,
    "custom": _custom,
}


def _of_bytes(
    config: DataConfig, seed: int, train: TensorImages, test: TensorImages, classes: tuple[str, ...]
) -> Dataset:
    """Return a data set of uint8 images in memory, a share of which validates."""
    images = train.samples
    trained, validation = hold_out(train, config.validation, seed)
    return Dataset(
        train=trained,
        test=test,
        classes=classes,
        input=image_input(images),
        preprocessing=standardizing(
            images, trained.indices if isinstance(trained, Part) else slice(None)
        ),
        validation=validation,
    )


def _augmented(config: AugmentedConfig, seed: int, images: Batch) -> TensorImages:
    return TensorImages(*images, seed, config.crop_padding, config.flip)
