import pytest
import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data import DATASETS, Dataset, digits, held_out_share, training_batches


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return digits()


def _images(dataset: Dataset, rank: int, world_size: int, batch_size: int) -> list[Tensor]:
    loader = training_batches(dataset, batch_size, rank, world_size, seed=3)
    return [samples for samples, _ in loader]


@pytest.mark.parametrize("name", DATASETS)
def test_split_is_fixed_and_disjoint(name: str) -> None:
    one, other = DATASETS[name](), DATASETS[name]()
    assert torch.equal(one.train.tensors[0], other.train.tensors[0])
    assert torch.equal(one.test.tensors[1], other.test.tensors[1])
    # A few digits are equal in all 64 pixels, so it is sizes that show nothing was counted twice.
    assert (len(one.train), len(one.test)) == (1437, 360)


@pytest.mark.parametrize("name", DATASETS)
def test_preprocessing_standardises_the_training_data(name: str) -> None:
    dataset = DATASETS[name]()
    inputs = dataset.preprocessing.apply(dataset.train.tensors[0])
    assert inputs.shape[1:] == dataset.input.shape
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sees_the_same_samples_however_many_replicas_share_it(
    dataset: Dataset, world_size: int
) -> None:
    whole = _images(dataset, 0, 1, 16 * world_size)
    shares = [_images(dataset, rank, world_size, 16) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        joined = torch.stack([share[step] for share in shares], 1).flatten(0, 1)
        assert torch.equal(joined, batch)
    assert all(len(share) == len(whole) for share in shares)


def test_order_changes_with_the_epoch_and_repeats_with_the_seed(dataset: Dataset) -> None:
    loader = training_batches(dataset, 16, 0, 2, seed=0)
    orders: list[Tensor] = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue] -- DataLoader types its sampler by the base class
        orders.append(torch.cat([labels for _, labels in loader]))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_shares_make_up_the_test_data(dataset: Dataset) -> None:
    labels = torch.cat([held_out_share(dataset, rank, 7)[1] for rank in range(7)])
    assert torch.equal(labels.sort()[0], dataset.test.tensors[1].sort()[0])


def test_batch_larger_than_the_data_is_refused(dataset: Dataset) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.batch_size=1000 on 2 replicas needs 2000 samples"
    ):
        training_batches(dataset, 1000, 0, 2, seed=0)
