"""Data sets by name: raw samples in a fixed split, and what a bundle has to say about them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.errors import ConfigError


@dataclass(frozen=True)
class Dataset:
    """Raw samples with their labels, split into training and test data.

    Attributes:
        train: pairs of a sample, shape `input.shape`, and a label, int64.
        test: likewise; no training sample is among them.
        classes: the name of each label.
        input: what one sample looks like.
        preprocessing: what turns samples into a model's input, from the training data alone.
    """

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    input: InputSpec
    preprocessing: Preprocessing


def digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1437 training and 360 test images, 1×8×8, 0 to 16.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998).
    """
    pixels, labels = sklearn_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in split[:2]
    )
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    scale = 1 / 16
    return Dataset(
        train=TensorDataset(train_x, train_y),
        test=TensorDataset(test_x, test_y),
        classes=tuple(str(digit) for digit in range(10)),
        input=InputSpec(name="image", shape=(1, 8, 8), dtype="float32"),
        preprocessing=Preprocessing(
            scale=scale,
            mean=(train_x.mul(scale).mean().item(),),
            std=(train_x.mul(scale).std().item(),),
        ),
    )


DATASETS: Mapping[str, Callable[[], Dataset]] = {"digits": digits}


def training_batches(
    dataset: Dataset, batch_size: int, rank: int, world_size: int, seed: int
) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return one replica's share of the training data, in an order that depends on seed and epoch.

    Over all replicas, step k of an epoch sees the samples k·B to (k + 1)·B of one permutation, with
    B = batch_size·world_size, however B is split; what is left at the end is dropped. Call
    `set_epoch` of its sampler before each epoch.

    Raises:
        ConfigError: the training data does not fill one step; on every replica alike.
    """
    if len(dataset.train) < batch_size * world_size:
        raise ConfigError(
            f"data.batch_size={batch_size} on {world_size} replicas needs "
            f"{batch_size * world_size} samples a step, but there are only {len(dataset.train)} "
            "training samples; lower it"
        )
    sampler = DistributedSampler(
        dataset.train, num_replicas=world_size, rank=rank, seed=seed, drop_last=True
    )
    return DataLoader(dataset.train, batch_size, sampler=sampler, drop_last=True)


def held_out_share(
    dataset: Dataset, rank: int, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one replica's samples and labels of the test data; the shares of all make it up."""
    samples, labels = dataset.test.tensors
    return samples[rank::world_size], labels[rank::world_size]
