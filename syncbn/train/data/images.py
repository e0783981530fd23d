"""Images in memory, the files of known data sets, and random changes that can be repeated."""

import gzip
import math
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data.sampling import Batch, Key

_Array = np.ndarray[Any, np.dtype[Any]]

_IDX_CLASSES = 10
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class TensorImages:
    """Images in memory, changed at random by seed, epoch and index alone.

    So a sample looks the same whichever rank or process fetches it, and whatever came before.

    Args:
        samples: shape (N, C, H, W), any dtype; one that numpy has too, if they are changed.
        labels: shape (N,), int64.
        seed: decides the changes.
        crop_padding: pixels of 0 on each side, from which an image of the same size is cropped.
        flip: whether every other image is mirrored, at random.

    Raises:
        ConfigError: shapes or dtypes are others.
    """

    def __init__(
        self,
        samples: Tensor,
        labels: Tensor,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        if samples.dim() != 4 or labels.shape != samples.shape[:1] or labels.dtype != torch.int64:
            raise ConfigError(
                "images in memory must be samples of shape (N, C, H, W) with labels of shape (N,) "
                f"and dtype torch.int64; received {tuple(samples.shape)} with "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        self.samples = samples
        self.labels = labels
        self._seed = seed
        self._padding = crop_padding
        self._flip = flip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the images of keys, changed, and their labels."""
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        images, labels = self.samples[indices], self.labels[indices]
        if not keys or not (self._padding or self._flip):
            return images, labels
        down, right, mirror = random_words(self._seed, keys).T
        changed: _Array = images.numpy()
        if self._padding:
            changed = _cropped(changed, self._padding, down, right)
        if self._flip:
            mirrored = mirror % 2 == 0
            changed[mirrored] = changed[mirrored, ..., ::-1]
        return torch.from_numpy(changed), labels

    def plain(self) -> "TensorImages":
        """Return the same images without random changes."""
        return TensorImages(self.samples, self.labels)


def load_digits() -> tuple[TensorImages, TensorImages]:
    """Return scikit-learn's digits for training and test, 1×8×8, from 0 to 16, float32."""
    split = split_digits()
    train_x, test_x = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in split[:2]
    )
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return TensorImages(train_x, train_y), TensorImages(test_x, test_y)


@cache
def split_digits() -> tuple[_Array, ...]:
    """Return the pixels and the labels of the digits for training and test, read once.

    What calls this before it forks spares its children the second that importing takes.
    """
    # Other data sets need neither.
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    pixels, labels = datasets.load_digits(return_X_y=True)
    split: Any = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    return tuple(split)


def read_cifar(path: str) -> tuple[Batch, Batch, tuple[str, ...]]:
    """Return the images and labels of CIFAR-10 for training and test, and the classes' names.

    Raises:
        ConfigError: the files are not there, or not the ones that were published.
    """
    from torchvision.datasets import CIFAR10

    found = Path(path)
    root = found.parent if found.name == CIFAR10.base_folder else found
    splits: list[Any] = []
    try:
        for train in (True, False):
            # Compares MD5 sums before it unpickles anything.
            splits.append(CIFAR10(root, train=train, download=False))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.path={path}: there is no intact CIFAR-10 (the files data_batch_1 to 5, "
            "test_batch and batches.meta of the version for Python); get "
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpack it, and give the "
            f"directory {CIFAR10.base_folder}"
        ) from error
    train_split, test_split = (
        (
            torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(split.targets, dtype=torch.int64),
        )
        for split in splits
    )
    return train_split, test_split, tuple(splits[0].classes)


def read_idx(path: str, how: str) -> tuple[Batch, Batch]:
    """Return images and labels for training and test from the four files of MNIST's format.

    Args:
        path: their directory.
        how: says in an error where to get them.

    Raises:
        ConfigError: a file is missing, or is not what its name says.
    """
    splits: list[Batch] = []
    for image_name, label_name in _IDX_FILES.values():
        images = _idx(_find(Path(path), image_name, how), 3).unsqueeze(1)
        labels = _idx(_find(Path(path), label_name, how), 1).long()
        if images.numel() == 0:
            raise ConfigError(f"data.path={path}: {image_name} has no pixel; get it again")
        if len(images) != len(labels):
            raise ConfigError(
                f"data.path={path}: {image_name} has {len(images)} images, but {label_name} "
                f"{len(labels)} labels; get both again"
            )
        if (labels >= _IDX_CLASSES).any():
            raise ConfigError(
                f"data.path={path}: {label_name} has the label {int(labels.max())}, but there are "
                f"{_IDX_CLASSES} classes; is it of another data set?"
            )
        splits.append((images, labels))
    return splits[0], splits[1]


def random_words(seed: int, keys: list[Key], count: int = 3) -> _Array:
    """Return `count` random numbers for each key, shape (n, count), uint64.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), the
    mixing function of SplitMix64, here of seed, epoch, index and which of the numbers.
    """
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2**64
        mixed = _mix(np.full((len(keys), count), seed % 2**64, dtype=np.uint64))
        which = np.arange(count, dtype=np.uint64)
        for part in (*np.array(keys, dtype=np.uint64).reshape(-1, 2).T[:, :, None], which):
            mixed = _mix(mixed + part + np.uint64(0x9E3779B97F4A7C15))
    return mixed


def _mix(words: _Array) -> _Array:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _cropped(images: _Array, padding: int, down: _Array, right: _Array) -> _Array:
    """Return images moved by up to `padding` pixels each way, with zeros where nothing was.

    By numpy, which copies each window row by row where torch would look up every pixel: 0.2 ms for
    256 images of 3×32×32, and not 2.4.
    """
    count, channels, height, width = images.shape
    places = np.uint64(2 * padding + 1)
    around = (count, channels, height + 2 * padding, width + 2 * padding)
    padded = np.zeros(around, images.dtype)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    windows = sliding_window_view(padded, (height, width), (2, 3))
    return windows[np.arange(count), :, down % places, right % places]


def _find(directory: Path, name: str, how: str) -> Path:
    stem = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", stem, f"{stem}.gz"):
        if (directory / candidate).is_file():
            return directory / candidate
    raise ConfigError(
        f"data.path={directory}: there is no file {name} or {name}.gz; get {how}, and give the "
        "directory with data.path=…"
    )


def _idx(file: Path, dimensions: int) -> Tensor:
    """Return the bytes of an IDX file as a tensor of its shape."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        head = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"cannot read {file}: {error}; get it again") from error
    body = np.frombuffer(content, dtype=np.uint8, offset=4 * (1 + dimensions))
    # The first number is the type, 8 for bytes, and how many dimensions follow.
    if head[0] != (8 << 8) + dimensions or body.size != math.prod(head[1:]):
        raise ConfigError(
            f"{file} is not an IDX file of bytes in {dimensions} dimensions, or is cut short; get "
            "it again"
        )
    return torch.from_numpy(body.copy().reshape(head[1:]))
