import math
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import ConfigError, DataError, SyncBNError, TrainingError
from syncbn.train.data.sampling import (
    Batch,
    Key,
    Loader,
    Samples,
    TrainingShare,
    held_out_batches,
    make_loader,
    share_out,
)
from syncbn.train.schema import DigitsConfig, Shares
from tests.support.jobs import is_alive, wait_until
from tests.support.world import CONTEXT

WORLDS = range(1, 8)
SIZES = [(1, 1), (2, 3), (7, 2), (48, 4), (97, 5)]


class Numbered(Samples):
    """Samples that say by which key and in which process they were fetched."""

    def __init__(self, size: int, deadly: int | None = None) -> None:
        self.size = size
        self.deadly = deadly

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: list[Key]) -> Batch:
        if self.deadly in [index for _, index in keys]:
            os.kill(os.getpid(), signal.SIGKILL)
        samples = torch.tensor([(*key, os.getpid()) for key in keys], dtype=torch.int64)
        return samples.view(len(keys), 3), torch.tensor([index for _, index in keys]).long()


def _shares(
    size: int,
    batch_size: int,
    world_size: int,
    epoch: int = 0,
    start: int = 0,
    seed: int = 0,
    **options: Any,
) -> list[TrainingShare]:
    shares = [
        TrainingShare(size, batch_size, rank, world_size, seed, **options)
        for rank in range(world_size)
    ]
    for share in shares:
        share.set_position(epoch, start)
    return shares


def _joined(shares: list[TrainingShare]) -> list[list[Key]]:
    """Return the batches over all ranks, each in its order within the permutation."""
    joined: list[list[Key]] = []
    for parts in zip(*shares, strict=True):
        batch: list[Any] = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            batch[rank :: len(parts)] = part
        joined.append(batch)
    return joined


def _order(size: int, epoch: int, seed: int = 0) -> list[int]:
    (share,) = _shares(size, 1, 1, epoch, seed=seed)
    return [index for ((_, index),) in share]


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
    shares = _shares(size, batch_size, world_size, epoch=2)
    (alone,) = _shares(size, batch_size * world_size, 1, epoch=2)
    assert _joined(shares) == list(alone)
    keys = [key for batch in alone for key in batch]
    assert sorted(keys) == [(2, index) for index in range(size)]
    assert {len(batch) for batch in list(alone)[:-1]} <= {batch_size * world_size}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_every_rank_makes_the_same_steps_with_shares_that_differ_by_one_at_most(
    size: int, batch_size: int, world_size: int
) -> None:
    shares = _shares(size, batch_size, world_size)
    steps = -(-size // (batch_size * world_size))
    assert [len(share) for share in shares] == [steps] * world_size
    for number, parts in enumerate(zip(*shares, strict=True)):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [share.total(number) for share in shares] == [sum(sizes)] * world_size


def test_a_rank_without_samples_gets_an_empty_batch() -> None:
    assert [[len(batch) for batch in share] for share in _shares(5, 1, 4)] == [[1, 1]] + [
        [1, 0]
    ] * 3


def test_order_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    orders = {(seed, epoch): _order(60, epoch, seed) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    torch.rand(7)
    assert all(_order(60, epoch, seed) == order for (seed, epoch), order in orders.items())
    assert len({tuple(order) for order in orders.values()}) == 9
    torch.set_rng_state(state)
    _order(60, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resumed_epoch_has_the_batches_that_were_left(world_size: int) -> None:
    whole = _joined(_shares(50, 4, world_size, epoch=3))
    for done in range(len(whole)):
        start = sum(len(batch) for batch in whole[:done])
        shares = _shares(50, 4, world_size, epoch=3, start=start)
        assert _joined(shares) == whole[done:]
        assert [len(share) for share in shares] == [len(whole) - done] * world_size
        assert shares[0].total(0) == len(whole[done])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("start", [0, 8, 24, 49, 50])
def test_epoch_resumed_by_another_number_of_ranks_has_the_rest_of_the_permutation(
    world_size: int, start: int
) -> None:
    shares = _shares(50, 3, world_size, epoch=1, start=start)
    batches = _joined(shares)
    assert [index for batch in batches for _, index in batch] == _order(50, 1)[start:]
    assert all(len(batch) == 3 * world_size for batch in batches[:-1])
    assert [shares[0].total(number) for number in range(len(batches))] == [
        len(batch) for batch in batches
    ]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("size", "batch_size"), [(7, 1), (48, 4), (97, 5)])
def test_without_the_last_batch_all_batches_are_full(
    size: int, batch_size: int, world_size: int
) -> None:
    shares = _shares(size, batch_size, world_size, epoch=2, drop_last=True)
    batches = _joined(shares)
    whole = batch_size * world_size
    assert {len(batch) for batch in batches} == {whole}
    assert shares[0].size_of_epoch == len(batches) * whole == size - size % whole
    assert [index for batch in batches for _, index in batch] == _order(size, 2)[
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
    (share, _) = _shares(50, 3, 2, epoch=1, start=start, drop_last=drop_last)
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
    shares = _shares(size, 4, world_size)
    assert [len(list(share)[-1]) for share in shares] == sizes
    assert shares[0].last_batch() == sizes


@pytest.mark.parametrize("world_size", [1, 3])
def test_balanced_epochs_have_as_many_samples_of_each_class(world_size: int) -> None:
    labels = torch.tensor([0] * 60 + [2] * 30 + [5] * 7 + [6])
    shares = _shares(98, 5, world_size, epoch=1, balanced=labels)
    drawn = [index for batch in _joined(shares) for _, index in batch]
    assert len(drawn) == 98
    counts = labels[drawn].bincount()[[0, 2, 5, 6]]
    assert sorted(counts.tolist()) == [24, 24, 25, 25]
    assert len({index for index in drawn if labels[index] == 0}) > 10
    for other in (
        _shares(98, 5, 1, epoch=2, balanced=labels),
        _shares(98, 5, 1, 1, seed=3, balanced=labels),
    ):
        assert [index for batch in _joined(other) for _, index in batch] != drawn
    (same,) = _shares(98, 5 * world_size, 1, epoch=1, balanced=labels)
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


@contextmanager
def loading(samples: Samples, batches: Any, workers: int) -> Generator[Loader]:
    """Yield a loader; close it, and see that its workers end."""
    loader = make_loader(samples, batches, workers, pinned=False)
    try:
        yield loader
    finally:
        pids = _worker_pids(loader)
        loader.close()
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=10)


def _iterator(loader: Loader) -> Any:
    """Return torch's iterator that has the workers, or None."""
    return vars(vars(loader)["_loader"])["_iterator"]


def _worker_pids(loader: Loader) -> list[int]:
    return [process.pid for process in getattr(_iterator(loader), "_workers", [])]


def _keys(batches: list[Batch]) -> list[list[Key]]:
    return [[(epoch, index) for epoch, index, _ in samples.tolist()] for samples, _ in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_fetches_the_share_in_its_order_and_follows_its_position(workers: int) -> None:
    (share,) = _shares(20, 3, 1)
    with loading(Numbered(20), share, workers) as loader:
        for epoch, start in ((0, 0), (1, 0), (1, 6), (4, 20), (0, 0)):
            share.set_position(epoch, start)
            assert len(loader) == len(share)
            assert _keys(list(loader)) == list(share)


def test_workers_stay_for_the_next_epoch() -> None:
    (share,) = _shares(20, 3, 1)
    with loading(Numbered(20), share, 2) as loader:
        seen: list[set[int]] = []
        for epoch in range(3):
            share.set_position(epoch)
            seen.append({int(pid) for samples, _ in loader for pid in samples[:, 2]})
        assert seen == [set(_worker_pids(loader))] * 3
        assert os.getpid() not in seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_early_does_not_reach_into_the_next(workers: int) -> None:
    (share,) = _shares(40, 2, 1)
    with loading(Numbered(40), share, workers) as loader:
        batches = iter(loader)
        first = [next(batches) for _ in range(3)]
        assert _keys(first) == list(share)[:3]
        share.set_position(1, 6)
        assert _keys(list(loader)) == list(share)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_global_generator_alone(workers: int) -> None:
    (share,) = _shares(20, 3, 1)
    with loading(Numbered(20), share, workers) as loader:
        state = torch.get_rng_state()
        for epoch in range(2):
            share.set_position(epoch)
            list(loader)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_without_samples_are_loaded(workers: int) -> None:
    share = _shares(5, 1, 4)[3]
    with loading(Numbered(5), share, workers) as loader:
        assert [tuple(samples.shape) for samples, _ in loader] == [(1, 3), (0, 3)]
    with loading(Numbered(5), held_out_batches(2, 8, 2, 3), workers) as loader:
        assert list(loader) == []


def test_workers_load_beside_a_process_group_in_use(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        (share,) = _shares(200, 2, 1)
        with loading(Numbered(200), share, 2) as loader:
            for epoch in range(2):
                share.set_position(epoch)
                for samples, _ in loader:
                    work = dist.all_reduce(samples, async_op=True)
                    assert work is not None
                    work.wait()
    finally:
        dist.destroy_process_group()


# torch raises it in a signal's handler, too, wherever Python is by then: in a destructor, maybe.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_dead_worker_is_an_error_and_no_hang() -> None:
    (share,) = _shares(40, 2, 1)
    began = time.monotonic()
    with (
        loading(Numbered(40, deadly=_order(40, 0)[30]), share, 2) as loader,
        pytest.raises(RuntimeError, match="DataLoader worker"),
    ):
        list(loader)
    assert time.monotonic() - began < 30


class Raising(Numbered):
    """Samples of which one raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__(8)
        self.error = error

    def __getitems__(self, keys: list[Key]) -> Batch:
        if (0, 3) in keys:
            raise self.error
        return super().__getitems__(keys)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ConfigError, TrainingError])
def test_an_error_of_ours_says_the_same_whichever_process_raises_it(
    kind: type[SyncBNError], workers: int
) -> None:
    batches = held_out_batches(8, 1, 0, 1)
    with loading(Raising(kind("what is wrong")), batches, workers) as loader:
        batch = iter(loader)
        assert _keys([next(batch) for _ in range(3)]) == batches[:3]
        with pytest.raises(DataError, match=r"^what is wrong$"):
            next(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_is_not_ours_keeps_its_type(workers: int) -> None:
    samples = Raising(ZeroDivisionError("somebody else's"))
    with (
        loading(samples, held_out_batches(8, 1, 0, 1), workers) as loader,
        pytest.raises(ZeroDivisionError, match="somebody else's"),
    ):
        list(loader)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_worker_that_does_not_answer_is_told_from_a_broken_network(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker that was killed, it is chance what torch sees first."""

    def reset(*_: object) -> None:
        raise error("by peer")

    with loading(Numbered(8), held_out_batches(8, 1, 0, 1), 1) as loader:
        list(loader)
        monkeypatch.setattr(type(_iterator(loader)), "_next_data", reset)
        with pytest.raises(RuntimeError, match=r"^a DataLoader worker does not .*data\.workers"):
            list(loader)
    alone = make_loader(Raising(error("of its own")), held_out_batches(8, 1, 0, 1), 0, False)
    with pytest.raises(error, match="of its own"):
        list(alone)


class Slow(Numbered):
    """Samples that take longer than the test's loader waits."""

    def __getitems__(self, keys: list[Key]) -> Batch:
        time.sleep(1)
        return super().__getitems__(keys)


def test_a_worker_that_gives_nothing_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncbn.train.data.sampling._WORKER_TIMEOUT_S", 0.1)
    with (
        loading(Slow(4), [[(0, 0)]], 1) as loader,
        pytest.raises(RuntimeError, match="timed out"),
    ):
        list(loader)


def _load_and_wait(sender: connection.Connection) -> None:
    # How often a worker looks whether its parent lives; 5 s, otherwise.
    patch = pytest.MonkeyPatch()
    patch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = make_loader(Numbered(4), held_out_batches(4, 1, 0, 1), 2, False)
    list(loader)
    sender.send(_worker_pids(loader))
    time.sleep(60)


def test_killed_rank_leaves_no_worker_behind() -> None:
    """Also where ranks, and so by default what they start, come from a server that forks."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    rank: Any = CONTEXT.Process(target=_load_and_wait, args=(sender,))
    rank.start()
    pids: list[int] = []
    try:
        assert receiver.poll(60)
        pids = receiver.recv()
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        rank.kill()
        rank.join()
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=10)
    finally:
        rank.kill()
        rank.join()
        for pid in filter(is_alive, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_labels_come_with_their_samples() -> None:
    samples: Tensor
    (share,) = _shares(10, 4, 1)
    with loading(Numbered(10), share, 0) as loader:
        for samples, labels in loader:
            assert torch.equal(samples[:, 1], labels)
