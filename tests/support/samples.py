"""Small data sets in memory, for tests of what is learned from them."""

import torch
from torch import Tensor

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.train.data import Dataset
from syncbn.train.data.sampling import Batch, Key


class Pairs:
    """Samples and targets in memory, whatever the targets are.

    Args:
        samples: shape (N, *).
        targets: shape (N, *).
    """

    def __init__(self, samples: Tensor, targets: Tensor) -> None:
        self.samples = samples
        self.targets = targets

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return those of keys."""
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        return self.samples[indices], self.targets[indices]


def dataset_of(
    targets: Tensor,
    classes: int,
    *,
    shape: tuple[int, ...] = (1, 8, 8),
    test: Tensor | None = None,
    validation: Tensor | None = None,
) -> Dataset:
    """Return a data set of random samples with given targets.

    Args:
        targets: of the training samples, shape (N, *).
        classes: how many there are.
        shape: of a sample.
        test: targets of the test samples; None: there are none.
        validation: those of the validation samples; None: there are none.
    """

    def pairs(of: Tensor, seed: int) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        return Pairs(torch.randn(len(of), *shape, generator=generator), of)

    channels = shape[0]
    return Dataset(
        train=pairs(targets, 0),
        test=None if test is None else pairs(test, 1),
        classes=tuple(f"class {number}" for number in range(classes)),
        input=InputSpec(name="image", shape=shape, dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0,) * channels, std=(1.0,) * channels),
        validation=None if validation is None else pairs(validation, 2),
    )
