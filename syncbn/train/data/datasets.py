"""Data sets by name: raw samples in a fixed split, and what a bundle has to say about them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.data.images import TensorImages, read_cifar, read_folder, read_idx
from syncbn.train.data.sampling import Key, Samples
from syncbn.train.schema import (
    AugmentedConfig,
    CustomDataConfig,
    DataConfig,
    FolderConfig,
    SyntheticConfig,
)

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class Dataset:
    """Raw samples with their labels, split into training and test data.

    Attributes:
        train: what is random about a sample of it depends on seed, epoch and index alone.
        test: likewise samples of shape `input.shape`; no training sample is among them.
        classes: the name of each label.
        input: what one sample looks like.
        preprocessing: what turns samples into a model's input, from the training data alone.
    """

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    input: InputSpec
    preprocessing: Preprocessing


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Return the configured data set; reads local files, and never the network.

    Raises:
        ConfigError: its files are missing or damaged, the user's own function fails, or its parts
            do not fit each other.
    """
    dataset = DATASETS[config.name](config, seed)
    match config:
        case CustomDataConfig():
            _check(dataset, f"data.factory={config.factory}")
        case AugmentedConfig() | FolderConfig():
            _check(dataset, f"data.path={config.path}")
        case _:
            _check(dataset, f"data={config.name}")
    return dataset


def digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1437 training and 360 test images, 1×8×8, 0 to 16.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998).
    """
    # They take a second, and other data sets need neither.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in split[:2]
    )
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    scale = 1 / 16
    return Dataset(
        train=TensorImages(train_x, train_y),
        test=TensorImages(test_x, test_y),
        classes=tuple(str(digit) for digit in range(10)),
        input=_input(train_x),
        preprocessing=Preprocessing(
            scale=scale,
            mean=(train_x.mul(scale).mean().item(),),
            std=(train_x.mul(scale).std().item(),),
        ),
    )


def _digits(config: DataConfig, seed: int) -> Dataset:
    return digits()


def _cifar10(config: DataConfig, seed: int) -> Dataset:
    """Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009)."""
    assert isinstance(config, AugmentedConfig)
    train, test, classes = read_cifar(config.path)
    return _of_bytes(config, seed, train, test, classes)


def _mnist(config: DataConfig, seed: int) -> Dataset:
    """Source: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning …" (1998)."""
    assert isinstance(config, AugmentedConfig)
    how = (
        "train-images-idx3-ubyte.gz and the three others of "
        "https://github.com/cvdfoundation/mnist, or another mirror"
    )
    train, test = read_idx(config.path, how)
    return _of_bytes(config, seed, train, test, tuple(str(digit) for digit in range(10)))


def _fashion_mnist(config: DataConfig, seed: int) -> Dataset:
    """Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST" (2017)."""
    assert isinstance(config, AugmentedConfig)
    how = (
        "Debian's package dataset-fashion-mnist, or the four files of "
        "https://github.com/zalandoresearch/fashion-mnist"
    )
    train, test = read_idx(config.path, how)
    return _of_bytes(config, seed, train, test, FASHION_CLASSES)


def _folder(config: DataConfig, seed: int) -> Dataset:
    assert isinstance(config, FolderConfig)
    train, test, classes = read_folder(config, seed)
    return Dataset(
        train=train,
        test=test,
        classes=classes,
        input=InputSpec(name="image", shape=(3, config.size, config.size), dtype="float32"),
        # ImageNet's, as for torchvision's own classifiers: reading all images first takes long.
        preprocessing=Preprocessing(
            scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
    )


def _synthetic(config: DataConfig, seed: int) -> Dataset:
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
    return Dataset(
        train=train,
        test=test,
        classes=tuple(str(number) for number in range(config.classes)),
        input=_input(train.samples),
        preprocessing=_standardizing(train.samples),
    )


def _custom(config: DataConfig, seed: int) -> Dataset:
    assert isinstance(config, CustomDataConfig)
    module, _, name = config.factory.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever somebody else's module raises
        raise ConfigError(
            f"data.factory={config.factory} cannot be imported: {type(error).__name__}: {error}; "
            "it must be package.module:function, of a package that is installed or in PYTHONPATH"
        ) from error
    if not callable(factory):
        raise ConfigError(
            f"data.factory={config.factory} is a {type(factory).__name__}; it must be a function "
            "that returns a syncbn.train.data.Dataset"
        )
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


DATASETS: Mapping[str, Callable[[DataConfig, int], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "synthetic": _synthetic,
    "custom": _custom,
}


def _check(dataset: Dataset, where: str) -> None:
    """Raise where parts of a data set do not fit, which hours of training would end in."""
    channels = dataset.input.shape[0]
    values = len(dataset.preprocessing.mean), len(dataset.preprocessing.std)
    if values != (channels, channels):
        raise ConfigError(
            f"{where}: preprocessing has {values[0]} means and {values[1]} deviations; "
            f"input.shape={dataset.input.shape} needs {channels} of each, one a channel"
        )
    classes: Any = dataset.classes  # whatever somebody else's code put there
    if not (isinstance(classes, tuple) and classes and all(isinstance(c, str) for c in classes)):
        raise ConfigError(f"{where}: classes is {classes!r}; it must be a tuple of names")
    for split, samples in (("train", dataset.train), ("test", dataset.test)):
        if len(samples) == 0:
            raise ConfigError(f"{where}: {split} has no samples; it needs at least one")
        ends = [(0, 0), (0, len(samples) - 1)]
        labels = _check_batch(dataset, f"{where}: {split}", samples, ends)
        # None at all is what a rank gets that is left without a share of an epoch's last batch.
        _check_batch(dataset, f"{where}: {split}", samples, [])
        if isinstance(samples, TensorImages):
            labels = samples.labels
        if labels.min() < 0 or labels.max() >= len(classes):
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise ConfigError(
                f"{where}: {split} has the label {wrong}, but there are {len(classes)} classes; "
                f"labels must be from 0 to {len(classes) - 1}"
            )


def _check_batch(dataset: Dataset, where: str, samples: Samples, keys: list[Key]) -> Tensor:
    """Return the labels of keys, whose samples must be as the data set says."""
    try:
        batch: Any = samples.__getitems__(keys)
        found = [(tuple(part.shape), part.dtype) for part in batch]
    except SyncBNError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"{where}.__getitems__({keys}) failed: {type(error).__name__}: {error}; it must return "
            "samples and labels as two tensors, for any number of keys, also none"
        ) from error
    shape = (len(keys), *dataset.input.shape)
    if [each for each, _ in found] != [shape, (len(keys),)] or found[1][1] != torch.int64:
        shown = " and ".join(f"{dtype} of shape {each}" for each, dtype in found)
        raise ConfigError(
            f"{where}.__getitems__({keys}) returned {shown}; it must return samples of shape "
            f"{shape}, as input.shape={dataset.input.shape} says, and labels of shape "
            f"({len(keys)},) and dtype torch.int64"
        )
    return batch[1]


def _of_bytes(
    config: AugmentedConfig,
    seed: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
) -> Dataset:
    return Dataset(
        train=TensorImages(*train, seed, config.crop_padding, config.flip),
        test=TensorImages(*test),
        classes=classes,
        input=_input(train[0]),
        preprocessing=_standardizing(train[0]),
    )


def _input(samples: Tensor) -> InputSpec:
    return InputSpec(name="image", shape=tuple(samples.shape[1:]), dtype="float32")


def _standardizing(images: Tensor) -> Preprocessing:
    """Return what gives each channel of uint8 images mean 0 and deviation 1; from histograms."""
    means: list[float] = []
    deviations: list[float] = []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts @ values / counts.sum()).item()
        means.append(mean)
        deviations.append((counts @ (values - mean) ** 2 / counts.sum()).sqrt().item())
    return Preprocessing(
        scale=1 / 255, mean=tuple(means), std=tuple(max(each, 1e-6) for each in deviations)
    )
