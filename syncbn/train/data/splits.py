"""Which samples are for what: parts of a data set, and the share of it that validates."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data.sampling import Batch, Key, Samples, labels_in_memory

# Tells this draw from others by the same seed.
_DRAW = 0x5EED


class Part:
    """Some of the samples of a data set, in an order of their own.

    A sample looks as it does in the whole: what is random about it depends on its index there.

    Args:
        samples: the whole.
        indices: which of them, shape (n,), int64.

    Attributes:
        labels: those of the part, shape (n,), int64; None if they are not in memory.
    """

    def __init__(self, samples: Samples, indices: Tensor) -> None:
        self.samples = samples
        self.indices = indices
        # One by one, a tensor's elements are slow.
        self._indices: list[int] = indices.tolist()
        labels = labels_in_memory(samples)
        self.labels = None if labels is None else labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the samples of keys, and their targets."""
        return self.samples.__getitems__([(epoch, self._indices[index]) for epoch, index in keys])

    def plain(self) -> "Part":
        """Return the same samples without random changes."""
        return Part(plain(self.samples), self.indices)

    def files(self) -> list[Any]:
        """Return what the whole says of its files, for this part; nothing if it has none."""
        offered: Any = getattr(self.samples, "files", None)
        found = offered() if offered is not None else []
        return [found[index] for index in self._indices] if found else []


def plain(samples: Samples) -> Samples:
    """Return samples without random changes, if they offer that by a method `plain`."""
    offered: Any = getattr(samples, "plain", None)
    return samples if offered is None else offered()


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Part | None]:
    """Split samples into those that train and those that validate, which are not changed at random.

    Each class gives the same share, to one sample, if the labels are in memory, and keeps at least
    one for training if it has one. The split depends on the number of samples, their labels, the
    share and the seed alone.

    Args:
        samples: for training.
        share: of them that validate, from 0 to below 1; at least one sample, unless it is 0.
        seed: decides which.

    Raises:
        ConfigError: no sample would be left to train with.
    """
    if share == 0:
        return samples, None
    count = len(samples)
    wanted = max(1, round(share * count))
    if wanted >= count:
        raise ConfigError(
            f"data.validation={share:g} of {count} training samples leaves none to train with; "
            "choose a smaller share, or data.validation=0 for no validation"
        )
    chance = np.random.default_rng(np.random.SeedSequence((seed, _DRAW)))
    order = torch.from_numpy(chance.permutation(count))
    labels = labels_in_memory(samples)
    held = order[:wanted] if labels is None else _drawn_by_class(order, labels, share, wanted)
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[held] = True
    train = Part(samples, (~is_held).nonzero().flatten())
    return train, Part(plain(samples), is_held.nonzero().flatten())


def _drawn_by_class(order: Tensor, labels: Tensor, share: float, wanted: int) -> Tensor:
    """Return the first samples of each class in an order: `wanted` in all, or as many as may go."""
    _, places, counts = labels.unique(return_inverse=True, return_counts=True)
    quota = counts.double() * share
    take = torch.minimum(quota.floor().long(), counts - 1)
    # What rounding down left over goes to the classes that it cost the most.
    missing = wanted - int(take.sum())
    places_by_loss = (quota - take).argsort(descending=True, stable=True)
    take[places_by_loss[(take < counts - 1)[places_by_loss]][: max(0, missing)]] += 1
    if not take.any():  # one sample a class: none can be spared, so that chance decides
        return order[:wanted]
    by_class = order[places[order].argsort(stable=True)]
    ends = counts.cumsum(0)
    number_in_class = torch.arange(len(order)) - (ends - counts).repeat_interleave(counts)
    return by_class[number_in_class < take.repeat_interleave(counts)]
