"""Whether the parts of a data set fit each other: said before training, not after hours of it."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.data.sampling import Key, Samples, labels_in_memory

if TYPE_CHECKING:
    from syncbn.train.data.dataset import Dataset

# What a mask says of a pixel that counts for nothing.
IGNORED = 255

Targets = Literal["labels", "masks", "other"]


def check_dataset(dataset: "Dataset", where: str, any_targets: bool) -> None:
    """Raise if the parts of a data set do not fit each other.

    Args:
        dataset: whose first and last samples are fetched, and whose labels in memory are all
            looked at.
        where: what an error says that it is about.
        any_targets: whether targets may be other tensors than labels and masks, and there may be
            no classes; they are for a task of the user's.

    Raises:
        ConfigError: it says which part does not fit, and how it should be.
    """
    channels = dataset.input.shape[0]
    values = len(dataset.preprocessing.mean), len(dataset.preprocessing.std)
    if values != (channels, channels):
        raise ConfigError(
            f"{where}: preprocessing has {values[0]} means and {values[1]} deviations; "
            f"input.shape={dataset.input.shape} needs {channels} of each, one a channel"
        )
    _check_classes(dataset, where, may_be_none=any_targets)
    kinds: dict[str, Targets] = {}
    for split, samples in splits(dataset).items():
        if len(samples) == 0:
            raise ConfigError(f"{where}: {split} has no samples; it needs at least one")
        ends: list[Key] = [(0, 0), (0, len(samples) - 1)]
        targets = _check_batch(dataset, f"{where}: {split}", samples, ends, any_targets)
        # None at all is what a rank gets that is left without a share of an epoch's last batch.
        _check_batch(dataset, f"{where}: {split}", samples, [], any_targets)
        kinds[split] = _kind(targets, dataset)
        if not any_targets:
            labels = labels_in_memory(samples)
            _check_values(dataset, f"{where}: {split}", targets if labels is None else labels)
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{split} has {kind}" for split, kind in kinds.items())
        raise ConfigError(f"{where}: {shown}; all splits must have the same kind of targets")


def kind_of_targets(dataset: "Dataset") -> Targets:
    """Return what the targets of a data set are, as its first training sample shows.

    "labels" are int64 of shape (n,), "masks" int64 of shape (n, H, W) with the samples' H and W.
    """
    return _kind(dataset.train.__getitems__([(0, 0)])[1], dataset)


def splits(dataset: "Dataset") -> dict[str, Samples]:
    """Return the splits that a data set has, by their names."""
    found = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: samples for name, samples in found.items() if samples is not None}


def _check_classes(dataset: "Dataset", where: str, may_be_none: bool) -> None:
    classes: Any = dataset.classes  # whatever somebody else's code put there
    is_tuple = isinstance(classes, tuple) and all(isinstance(each, str) for each in classes)
    if not is_tuple or not (classes or may_be_none):
        raise ConfigError(f"{where}: classes is {classes!r}; it must be a tuple of names")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{where}: {_listed(twice)} stands more than once in classes; give each class a name "
            "of its own, by which answers tell it from others"
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{where}: the class name {name!r} is not Unicode, so that no bundle could hold "
                "it; rename the class"
            ) from error
    colors: Any = dataset.palette
    if colors is not None and (
        len(colors) != len(classes)
        or any(len(color) != 3 or not all(0 <= part <= 255 for part in color) for color in colors)
    ):
        raise ConfigError(
            f"{where}: palette must have three numbers from 0 to 255 for each of the "
            f"{len(classes)} classes; received {colors!r}"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")


def _check_batch(
    dataset: "Dataset", where: str, samples: Samples, keys: list[Key], any_targets: bool
) -> Tensor:
    """Return the targets of keys, whose samples must be as the data set says."""
    try:
        batch: Any = samples.__getitems__(keys)
        found = [(tuple(part.shape), part.dtype) for part in batch]
    except SyncBNError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"{where}.__getitems__({keys}) failed: {type(error).__name__}: {error}; it must return "
            "samples and targets as two tensors, for any number of keys, also none"
        ) from error
    shape = (len(keys), *dataset.input.shape)
    if (
        len(found) == 2
        and found[0][0] == shape
        and (_kind(batch[1], dataset) != "other" or (any_targets and found[1][0][:1] == shape[:1]))
    ):
        return batch[1]
    shown = " and ".join(f"{dtype} of shape {each}" for each, dtype in found)
    wanted = f"labels of shape ({len(keys)},) and dtype torch.int64"
    if len(dataset.input.shape) == 3:
        wanted += f", or masks of shape {(len(keys), *dataset.input.shape[1:])} and that dtype"
    if any_targets:
        wanted = f"targets whose first axis has the length {len(keys)}"
    raise ConfigError(
        f"{where}.__getitems__({keys}) returned {shown}; it must return samples of shape {shape}, "
        f"as input.shape={dataset.input.shape} says, and {wanted}"
    )


def _kind(targets: Tensor, dataset: "Dataset") -> Targets:
    if targets.dtype == torch.int64 and targets.dim() == 1:
        return "labels"
    if (
        targets.dtype == torch.int64
        and len(dataset.input.shape) == 3
        and tuple(targets.shape[1:]) == dataset.input.shape[1:]
    ):
        return "masks"
    return "other"


def _check_values(dataset: "Dataset", where: str, targets: Tensor) -> None:
    """Raise if a label, or a mask's pixel, is of no class."""
    count = len(dataset.classes)
    what, more = "label", ""
    if targets.dim() > 1:
        targets = targets[targets != IGNORED]
        what, more = "pixel value", f", or {IGNORED} if the pixel counts for nothing"
    if not targets.numel() or (targets.min() >= 0 and targets.max() < count):
        return
    wrong = int(targets.min() if targets.min() < 0 else targets.max())
    raise ConfigError(
        f"{where} has the {what} {wrong}, but there are {count} classes; {what}s must be from 0 to "
        f"{count - 1}{more}"
    )
