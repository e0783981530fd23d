import math
from typing import Any

import pytest
import torch

from syncbn.errors import ConfigError
from syncbn.train.data.sampling import Key, TrainingShare, held_out_batches, share_out
from syncbn.train.schema import DigitsConfig, Shares
from tests.syncbn.train.data.test_sampling import Numbered, order_of, shares_of

WORLDS = range(1, 8)
SIZES = [(1, 1), (2, 3), (7, 2), (48, 4), (97, 5)]


def _joined(shares: list[TrainingShare]) -> list[list[Key]]:
    """Return the batches over all ranks, each in its order within the permutation."""
    joined: list[list[Key]] = []
    for parts in zip(*shares, strict=True):
        batch: list[Any] = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            batch[rank :: len(parts)] = part
        joined.append(batch)
    return joined


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_by_class_hold_the_same_samples_in_every_epoch(world_size: int) -> None:
    labels = torch.arange(20).flip(0) // 5  # 3 3 3 3 3 2 … 0
    shares = [TrainingShare(20, 2, r, world_size, 0, labels) for r in range(world_size)]
    seen: list[list[int]] = []
    for epoch in (0, 1):
        for share in shares:
            share.set_position(epoch)
        seen.append([index for share in shares for batch in share for _, index in batch])
        assert sorted(seen[-1]) == list(range(20))
    for rank, share in enumerate(shares):
        mine = [{int(labels[i]) for batch in share for _, i in batch} for _ in range(2)]
        assert mine[0] == mine[1]
        # The first ranks have the first classes.
        assert max(mine[0]) <= math.ceil(4 * (rank + 1) / world_size)
        assert min(mine[0]) >= 4 * rank // world_size
    assert seen[0] != seen[1]  # each shuffles its own


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_an_epoch_is_one_permutation_in_batches_however_many_share_them(
    size: int, batch_size: int, world_size: int
) -> None:
    shares = shares_of(size, batch_size, world_size, epoch=2)
    (alone,) = shares_of(size, batch_size * world_size, 1, epoch=2)
    assert _joined(shares) == list(alone)
    keys = [key for batch in alone for key in batch]
    assert sorted(keys) == [(2, index) for index in range(size)]
    assert {len(batch) for batch in list(alone)[:-1]} <= {batch_size * world_size}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_every_rank_makes_the_same_steps_with_shares_that_differ_by_one_at_most(
    size: int, batch_size: int, world_size: int
) -> None:
    shares = shares_of(size, batch_size, world_size)
    steps = -(-size // (batch_size * world_size))
    assert [len(share) for share in shares] == [steps] * world_size
    for number, parts in enumerate(zip(*shares, strict=True)):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [share.total(number) for share in shares] == [sum(sizes)] * world_size


def test_a_rank_without_samples_gets_an_empty_batch() -> None:
    assert [[len(batch) for batch in share] for share in shares_of(5, 1, 4)] == [[1, 1]] + [
        [1, 0]
    ] * 3


def test_order_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    orders = {(seed, epoch): order_of(60, epoch, seed) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    torch.rand(7)
    assert all(order_of(60, epoch, seed) == order for (seed, epoch), order in orders.items())
    assert len({tuple(order) for order in orders.values()}) == 9
    torch.set_rng_state(state)
    order_of(60, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resumed_epoch_has_the_batches_that_were_left(world_size: int) -> None:
    whole = _joined(shares_of(50, 4, world_size, epoch=3))
    for done in range(len(whole)):
        start = sum(len(batch) for batch in whole[:done])
        shares = shares_of(50, 4, world_size, epoch=3, start=start)
        assert _joined(shares) == whole[done:]
        assert [len(share) for share in shares] == [len(whole) - done] * world_size
        assert shares[0].total(0) == len(whole[done])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("start", [0, 8, 24, 49, 50])
def test_epoch_resumed_by_another_number_of_ranks_has_the_rest_of_the_permutation(
    world_size: int, start: int
) -> None:
    shares = shares_of(50, 3, world_size, epoch=1, start=start)
    batches = _joined(shares)
    assert [index for batch in batches for _, index in batch] == order_of(50, 1)[start:]
    assert all(len(batch) == 3 * world_size for batch in batches[:-1])
    assert [shares[0].total(number) for number in range(len(batches))] == [
        len(batch) for batch in batches
    ]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("size", "batch_size"), [(7, 1), (48, 4), (97, 5)])
def test_without_the_last_batch_all_batches_are_full(
    size: int, batch_size: int, world_size: int
) -> None:
    shares = shares_of(size, batch_size, world_size, epoch=2, drop_last=True)
    batches = _joined(shares)
    whole = batch_size * world_size
    assert {len(batch) for batch in batches} == {whole}
    assert shares[0].size_of_epoch == len(batches) * whole == size - size % whole
    assert [index for batch in batches for _, index in batch] == order_of(size, 2)[
        : size - size % whole
    ]
    assert shares[-1].last_batch() == [batch_size] * world_size


def test_an_epoch_without_a_full_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop_last=true leaves none of 7 .*2 replicas is 8"):
        TrainingShare(7, 4, 0, 2, 0, drop_last=True)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("start", [0, 6, 31, 45, 46, 50])
def test_steps_are_those_that_the_batches_make(
    start: int, accumulate: int, drop_last: bool
) -> None:
    (share, _) = shares_of(50, 3, 2, epoch=1, start=start, drop_last=drop_last)
    batches = list(share)
    assert share.steps(start, accumulate) == math.ceil(len(batches) / accumulate)
    assert sum(share.total(number) for number in range(len(batches))) == share.size_of_epoch - start
    assert share.size_of_epoch == (start + (50 - start) // 6 * 6 if drop_last else 50)


@pytest.mark.parametrize(
    ("size", "world_size", "sizes"), [(9, 2, [1, 0]), (15, 2, [4, 3]), (16, 2, [4, 4]), (3, 1, [3])]
)
def test_what_each_rank_has_of_the_last_batch_is_known_at_the_start(
    size: int, world_size: int, sizes: list[int]
) -> None:
    shares = shares_of(size, 4, world_size)
    assert [len(list(share)[-1]) for share in shares] == sizes
    assert shares[0].last_batch() == sizes


@pytest.mark.parametrize("world_size", [1, 3])
def test_balanced_epochs_have_as_many_samples_of_each_class(world_size: int) -> None:
    labels = torch.tensor([0] * 60 + [2] * 30 + [5] * 7 + [6])
    shares = shares_of(98, 5, world_size, epoch=1, balanced=labels)
    drawn = [index for batch in _joined(shares) for _, index in batch]
    assert len(drawn) == 98
    counts = labels[drawn].bincount()[[0, 2, 5, 6]]
    assert sorted(counts.tolist()) == [24, 24, 25, 25]
    assert len({index for index in drawn if labels[index] == 0}) > 10
    for other in (
        shares_of(98, 5, 1, epoch=2, balanced=labels),
        shares_of(98, 5, 1, 1, seed=3, balanced=labels),
    ):
        assert [index for batch in _joined(other) for _, index in batch] != drawn
    (same,) = shares_of(98, 5 * world_size, 1, epoch=1, balanced=labels)
    assert [index for batch in same for _, index in batch] == drawn
    # Neighbors are of all classes.
    assert set(labels[drawn[:12]].tolist()) == {0, 2, 5, 6}


class _Labeled(Numbered):
    labels = torch.arange(8) % 2


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, 8),
        ({"drop_last": True, "batch_size": 3}, 6),
        ({"balanced": True}, 8),
        ({"shares": Shares.by_class}, 8),
    ],
)
def test_samples_are_shared_out_as_configured(options: dict[str, Any], keys: int) -> None:
    values: dict[str, Any] = {"batch_size": 2, "workers": 0} | options
    config = DigitsConfig(**values)
    shares = [share_out(config, _Labeled(8), rank, 2, 0) for rank in range(2)]
    assert sum(len(batch) for share in shares for batch in share) == keys
    if config.shares is Shares.by_class:
        assert {index % 2 for batch in shares[0] for _, index in batch} == {0}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"balanced": True}, "data.balanced=true needs the labels .*choose data.balanced=false"),
        ({"shares": Shares.by_class}, "data.shares=by_class needs .*choose data.shares=mixed"),
    ],
)
def test_labels_that_are_not_in_memory_are_asked_for(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        share_out(DigitsConfig(batch_size=2, workers=0, **options), Numbered(8), 0, 1, 0)


def test_balanced_shares_are_not_by_class() -> None:
    config = DigitsConfig(batch_size=2, workers=0, balanced=True, shares=Shares.by_class)
    with pytest.raises(ConfigError, match=r"data\.shares=by_class rules out; choose one"):
        share_out(config, _Labeled(8), 0, 1, 0)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("size", [1, 5, 64, 97])
def test_evaluation_counts_every_sample_once(size: int, world_size: int) -> None:
    ranks = [held_out_batches(size, 8, rank, world_size) for rank in range(world_size)]
    keys = [[key for batch in batches for key in batch] for batches in ranks]
    assert sorted(key for share in keys for key in share) == [(0, index) for index in range(size)]
    assert max(map(len, keys)) - min(map(len, keys)) <= 1
    assert all(1 <= len(batch) <= 8 for batches in ranks for batch in batches)
