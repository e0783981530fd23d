import os
import signal
import time
from collections.abc import Generator, Iterator
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
)
from tests.support.jobs import is_alive, wait_until
from tests.support.world import CONTEXT


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


def shares_of(
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


def order_of(size: int, epoch: int, seed: int = 0) -> list[int]:
    (share,) = shares_of(size, 1, 1, epoch, seed=seed)
    return [index for ((_, index),) in share]


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
    (share,) = shares_of(20, 3, 1)
    with loading(Numbered(20), share, workers) as loader:
        for epoch, start in ((0, 0), (1, 0), (1, 6), (4, 20), (0, 0)):
            share.set_position(epoch, start)
            assert len(loader) == len(share)
            assert _keys(list(loader)) == list(share)


def test_workers_stay_for_the_next_epoch() -> None:
    (share,) = shares_of(20, 3, 1)
    with loading(Numbered(20), share, 2) as loader:
        seen: list[set[int]] = []
        for epoch in range(3):
            share.set_position(epoch)
            seen.append({int(pid) for samples, _ in loader for pid in samples[:, 2]})
        assert seen == [set(_worker_pids(loader))] * 3
        assert os.getpid() not in seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_early_does_not_reach_into_the_next(workers: int) -> None:
    (share,) = shares_of(40, 2, 1)
    with loading(Numbered(40), share, workers) as loader:
        batches = iter(loader)
        first = [next(batches) for _ in range(3)]
        assert _keys(first) == list(share)[:3]
        share.set_position(1, 6)
        assert _keys(list(loader)) == list(share)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_global_generator_alone(workers: int) -> None:
    (share,) = shares_of(20, 3, 1)
    with loading(Numbered(20), share, workers) as loader:
        state = torch.get_rng_state()
        for epoch in range(2):
            share.set_position(epoch)
            list(loader)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_without_samples_are_loaded(workers: int) -> None:
    share = shares_of(5, 1, 4)[3]
    with loading(Numbered(5), share, workers) as loader:
        assert [tuple(samples.shape) for samples, _ in loader] == [(1, 3), (0, 3)]
    with loading(Numbered(5), held_out_batches(2, 8, 2, 3), workers) as loader:
        assert list(loader) == []


def test_workers_load_beside_a_process_group_in_use(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        (share,) = shares_of(200, 2, 1)
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
    (share,) = shares_of(40, 2, 1)
    began = time.monotonic()
    with (
        loading(Numbered(40, deadly=order_of(40, 0)[30]), share, 2) as loader,
        pytest.raises(RuntimeError, match="DataLoader worker"),
    ):
        list(loader)
    assert time.monotonic() - began < 30


class Cut:
    """A loader whose worker is gone, of which the kernel tells a little later than its socket."""

    num_workers = 2

    def __iter__(self) -> Iterator[Any]:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise ConnectionResetError


def test_worker_that_is_gone_is_one_error_and_no_second_one_later() -> None:
    def handle(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with pytest.raises(RuntimeError, match=r"pid 1\) is killed"):
            list(Loader(Cut()))  # pyright: ignore[reportArgumentType] -- as far as is needed
        time.sleep(0.2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    (share,) = shares_of(10, 4, 1)
    with loading(Numbered(10), share, 0) as loader:
        for samples, labels in loader:
            assert torch.equal(samples[:, 1], labels)
