"""Images in folders that are classes."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data.files import (
    MAX_PIXELS,
    check_utf8,
    files_below,
    listed,
    read_file,
    readable,
    relative_sizes,
)
from syncbn.train.data.images import random_words
from syncbn.train.data.sampling import Batch, Key
from syncbn.train.schema import FolderConfig


class FolderImages:
    """Images in files, decoded when they are fetched, as RGB of one size.

    Without random changes they are what a service makes of the same files: both use
    `syncbn.images`.

    Args:
        files: paths and labels.
        config: the size, and how images are changed at random.
        seed: decides the changes; None: there are none, but the middle of each image.

    Attributes:
        labels: of all images, shape (N,), int64.
    """

    def __init__(
        self, files: list[tuple[str, int]], config: FolderConfig, seed: int | None
    ) -> None:
        self._files = files
        self._config = config
        self._seed = seed
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the images of keys, changed, shape (n, 3, size, size), uint8, and their labels."""
        size = self._config.size
        images = torch.empty(len(keys), 3, size, size, dtype=torch.uint8)
        for number, key in enumerate(keys):
            images[number] = self._image(key)
        return images, self.labels[[index for _, index in keys]]

    def plain(self) -> "FolderImages":
        """Return the middle of each of the same images, without random changes."""
        return FolderImages(self._files, self._config, None)

    def without_damaged(self, moves: Callable[[], None]) -> "FolderImages":
        """Return the images that can be read; the others are logged.

        Args:
            moves: is called from time to time, so that nobody takes this for a hang.
        """
        middles = self.plain()
        good = readable(len(self), lambda number: middles._image((0, number)), moves)
        return FolderImages([self._files[number] for number in good], self._config, self._seed)

    def files(self) -> list[tuple[str, int]]:
        """Return the files' names below data.path, and sizes in bytes; see `relative_sizes`."""
        return relative_sizes([file for file, _ in self._files], self._config.path)

    def _image(self, key: Key) -> Tensor:
        # Pillow and torchvision take a second to import, and other data sets need neither.
        from syncbn.images import decode_image, image_array, read_image

        size = self._config.size
        file, _ = self._files[key[1]]
        if self._seed is None:
            shape = (3, size, size)
            pixels = read_file(
                file,
                lambda content: read_image(content, shape, max_pixels=MAX_PIXELS, any_format=True),
            )
            return torch.from_numpy(pixels)
        whole = read_file(
            file,
            lambda content: decode_image(content, 3, max_pixels=MAX_PIXELS, any_format=True),
        )
        from torchvision.transforms import v2

        area = (self._config.crop_scale_min, 1.0)
        image = torch.from_numpy(image_array(whole))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs too, whose generators are not put back.
            torch.default_generator.manual_seed(int(random_words(self._seed, [key])[0, 0]))
            changed: Tensor = v2.RandomResizedCrop(size, area, antialias=True)(image)
            return v2.RandomHorizontalFlip(0.5 if self._config.flip else 0.0)(changed)


def read_folder(config: FolderConfig, seed: int) -> tuple[dict[str, FolderImages], tuple[str, ...]]:
    """Return the images below path/train/CLASS, val/CLASS and test/CLASS, and the classes.

    One of val and test may be missing, and either may lack classes that train has.

    Returns:
        The splits that there are, by the names of their directories; only those of train are
        changed at random.

    Raises:
        ConfigError: train, or both others, are missing or hold no image; a class of training holds
            none; another split has a class that training lacks; a class's name is not Unicode.
    """
    path = Path(config.path)
    try:
        classes = _class_names(path / "train")
        splits = {"train": _labeled_files(path / "train", classes)}
        empty = sorted(set(range(len(classes))) - {label for _, label in splits["train"]})
        if empty:
            names = listed([classes[label] for label in empty])
            raise FileNotFoundError(f"there is no image of {names} in {path / 'train'}")
        for split in ("val", "test"):
            if (path / split).is_dir():
                more = sorted(set(_class_names(path / split)) - set(classes))
                if more:
                    raise ConfigError(
                        f"data.path={path}: {listed(more)} is in {path / split} and not in "
                        f"{path / 'train'}; nothing can be learned of it, so remove it, or add "
                        "images of it for training"
                    )
                splits[split] = _labeled_files(path / split, classes)
                if not splits[split]:
                    raise FileNotFoundError(f"there is no image in {path / split}")
        if len(splits) == 1:
            raise FileNotFoundError(f"there is neither {path / 'val'} nor {path / 'test'}")
    except OSError as error:
        raise ConfigError(
            f"data.path={path}: there must be images in {path}/train/CLASS, and in "
            f"{path}/val/CLASS, {path}/test/CLASS or both: {error}"
        ) from error
    images = {
        split: FolderImages(files, config, seed if split == "train" else None)
        for split, files in splits.items()
    }
    return images, classes


def _class_names(directory: Path) -> tuple[str, ...]:
    """Return the names of the directories in a directory, in order."""
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if not names:
        raise FileNotFoundError(f"there is no directory in {directory}")
    for name in names:
        check_utf8(directory / name)
    return tuple(names)


def _labeled_files(directory: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in files_below(directory / name)
    ]
