"""What every reducer must do, on every rank of worlds of 1 to 8."""

import importlib
import os
import random
import re
import select
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.gather import all_gather
from syncbn.comm.reducer import (
    ProcessGroupReducer,
    Reducer,
    SharedMemoryReducer,
    SingleReplica,
    select_reducer,
)
from syncbn.errors import InputError, ReplicaError
from tests.support.world import WorldError, run_world

SIZES = [0, 1, 7, 129, 4097, 20001]

choices = pytest.mark.parametrize("choice", ["shared_memory", "process_group"])


def _reducer(choice: str, group: dist.ProcessGroup | None = None) -> Reducer:
    return select_reducer(group, torch.device("cpu"), choice)


def _share(rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _sum_each_size(choice: str) -> list[Tensor]:
    reducer = _reducer(choice)
    sums: list[Tensor] = []
    for size in SIZES:
        vector = _share(dist.get_rank(), size)
        before = vector.clone()
        sums.append(reducer.sum(vector))
        assert torch.equal(vector, before)
    return sums


@choices
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_sums_are_bit_identical_on_all_ranks_and_from_run_to_run(
    choice: str, world_size: int
) -> None:
    runs = run_world(world_size, _sum_each_size, choice)
    runs += run_world(world_size, _sum_each_size, choice)
    for number, size in enumerate(SIZES):
        expected = torch.stack([_share(rank, size) for rank in range(world_size)]).sum(0)
        torch.testing.assert_close(runs[0][number], expected, rtol=1e-13, atol=1e-13)
        for sums in runs:
            assert torch.equal(sums[number], runs[0][number])


def _sum_in_pairs(choice: str) -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[dist.get_rank() // 2]
    assert isinstance(mine, dist.ProcessGroup)
    reducer = _reducer(choice, mine)
    assert reducer.world_size == 2
    return reducer.sum(torch.tensor([float(dist.get_rank())])).item()


@choices
def test_disjoint_groups_sum_apart(choice: str) -> None:
    assert run_world(4, _sum_in_pairs, choice) == [1.0, 1.0, 5.0, 5.0]


def _sum_with_delays(choice: str, rounds: int) -> None:
    reducer, rank, world = _reducer(choice), dist.get_rank(), dist.get_world_size()
    delays = random.Random(rank)
    for i in range(rounds):
        if delays.random() < 0.02:
            time.sleep(delays.random() * 1e-3)
        total = reducer.sum(torch.full((3,), float(i * world + rank), dtype=torch.float64))
        expected = float(i * world * world + world * (world - 1) // 2)
        assert total.tolist() == [expected] * 3, (i, total)


@pytest.mark.parametrize(
    ("choice", "rounds"), [("shared_memory", 10_000), ("process_group", 500)], ids=str
)
def test_no_round_is_lost_or_mixed_up_under_random_delays(choice: str, rounds: int) -> None:
    run_world(3, _sum_with_delays, choice, rounds)


def _sum_in_threads(choice: str) -> None:
    groups = [dist.new_group([0, 1]) for _ in range(3)]
    failures: list[BaseException] = []

    def work(number: int, group: dist.ProcessGroup) -> None:
        try:
            reducer = _reducer(choice, group)
            for i in range(200):
                total = reducer.sum(torch.tensor([number * 1000.0 + i], dtype=torch.float64))
                assert total.item() == 2 * (number * 1000.0 + i)
        except BaseException as failure:  # the test's thread shall raise it
            failures.append(failure)

    threads: list[threading.Thread] = []
    for number, group in enumerate(groups):
        assert isinstance(group, dist.ProcessGroup)
        threads.append(threading.Thread(target=work, args=(number, group)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@choices
def test_groups_may_sum_at_once_in_several_threads(choice: str) -> None:
    run_world(2, _sum_in_threads, choice)


def _lose_a_peer(choice: str, seen: Path) -> None:
    reducer = _reducer(choice)
    for _ in range(3):
        reducer.sum(torch.ones(5, dtype=torch.float64))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        reducer.sum(torch.ones(5, dtype=torch.float64))
    with pytest.raises(RuntimeError) as raised:  # and again, at once
        reducer.sum(torch.ones(5, dtype=torch.float64))
    assert time.monotonic() - start < 20
    seen.write_text(str(raised.value))


@choices
def test_killed_peer_ends_the_wait(choice: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with pytest.raises(WorldError, match="rank 1 died without a word"):
        run_world(2, _lose_a_peer, choice, seen, grace_s=30)
    message = seen.read_text()
    if choice == "shared_memory":
        assert re.search(r"failed earlier: rank 1 \(process \d+ on this host\) is gone", message)


def _absent_peer() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    assert isinstance(group, dist.ProcessGroup)
    reducer, vector = _reducer("shared_memory", group), torch.ones(2, dtype=torch.float64)
    reducer.sum(vector)
    first = os.pidfd_open(all_gather([os.getpid()], group)[0][0])
    if dist.get_rank() == 0:
        late = r"rank 1 \(process \d+ on this host\) did not come within .* time-out of 1 s"
        with pytest.raises(ReplicaError, match=late):
            reducer.sum(vector)
        return
    select.select([first], [], [])  # until rank 0 has given up, and even ended
    assert torch.equal(reducer.sum(vector), 2 * vector)  # which it had posted before
    with pytest.raises(ReplicaError, match=r"rank 0 \(.*\) gave up, and says why itself"):
        reducer.sum(vector)


def test_absent_peer_is_named_at_the_deadline_and_learns_of_it_even_later() -> None:
    run_world(2, _absent_peer)


def _different_sizes() -> None:
    reducer = _reducer("shared_memory")
    reducer.sum(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ReplicaError, match="sum vectors of different sizes"):
        reducer.sum(torch.ones(3 + dist.get_rank(), dtype=torch.float64))


def test_vectors_of_different_sizes_are_an_error_on_both_ranks() -> None:
    run_world(2, _different_sizes)


def _different_choices() -> None:
    reducer = _reducer("shared_memory" if dist.get_rank() == 0 else "auto")
    with pytest.raises(InputError, match="choose the same on all of them"):
        reducer.sum(torch.ones(2, dtype=torch.float64))


def test_different_choices_are_an_error_on_all_ranks() -> None:
    run_world(2, _different_choices)


def _pretend_hosts(choice: str, hosts: list[int]) -> tuple[str, list[Tensor]]:
    from syncbn.comm import shared_memory

    shared_memory.host = lambda: hosts[dist.get_rank()]  # one machine plays several
    reducer = _reducer(choice)
    sums = [reducer.sum(_share(dist.get_rank(), size)) for size in SIZES]
    assert isinstance(reducer, SharedMemoryReducer)
    return type(reducer._route).__name__, sums  # pyright: ignore[reportPrivateUsage] -- which way it went


@pytest.mark.parametrize(
    ("choice", "hosts", "route"),
    [
        ("auto", [1, 1, 2, 2], "_SeveralHosts"),
        ("auto", [1, 2, 1, 1], "_SeveralHosts"),
        ("auto", [1, 2, 3], "ProcessGroupReducer"),
        ("auto", [1, 1, 0], "ProcessGroupReducer"),
        ("shared_memory", [1, 2, 3], "_SeveralHosts"),
    ],
    ids=str,
)
def test_several_hosts_sum_over_one_leader_each(choice: str, hosts: list[int], route: str) -> None:
    results = run_world(len(hosts), _pretend_hosts, choice, hosts)
    for number, size in enumerate(SIZES):
        expected = torch.stack([_share(rank, size) for rank in range(len(hosts))]).sum(0)
        for kind, sums in results:
            assert kind == route
            torch.testing.assert_close(sums[number], expected, rtol=1e-13, atol=1e-13)
            assert torch.equal(sums[number], results[0][1][number])


def test_insisting_on_the_impossible_fails_on_all_ranks() -> None:
    with pytest.raises(WorldError, match="the ranks cannot share memory, and SYNCBN_REDUCER"):
        run_world(2, _pretend_hosts, "shared_memory", [0, 1])


def _selected(choice: str | None = None) -> str:
    return type(select_reducer(None, torch.device("cpu"), choice)).__name__


def test_reducer_is_chosen_by_world_size_device_and_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SYNCBN_REDUCER", raising=False)
    assert isinstance(select_reducer(None), SingleReplica)
    assert run_world(1, _selected) == [SingleReplica.__name__]
    assert run_world(2, _selected) == [SharedMemoryReducer.__name__] * 2
    assert run_world(2, _selected, "process_group") == [ProcessGroupReducer.__name__] * 2
    assert run_world(2, _selected_elsewhere) == [ProcessGroupReducer.__name__] * 2


def _selected_elsewhere() -> str:
    meta = torch.device("meta")
    for value, device, message in (
        ("shared_memory", meta, "it is for the CPU alone"),
        ("sockets", None, "is 'sockets'; set it to auto or shared_memory or process_group or symm"),
    ):
        variable = mock.patch.dict(os.environ, SYNCBN_REDUCER=value)
        with variable, pytest.raises(InputError, match=message):
            select_reducer(None, device)
    return type(select_reducer(None, meta)).__name__


def _selected_without_gloo() -> str:
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers a backend
    group = dist.new_group([0, 1], backend="fake")
    assert isinstance(group, dist.ProcessGroup)
    with pytest.raises(InputError, match="it takes gloo for the CPU, choose 'auto' or"):
        select_reducer(group, None, "shared_memory")
    return type(select_reducer(group)).__name__


def test_group_that_cannot_exchange_on_the_cpu_is_not_asked_to() -> None:
    assert run_world(2, _selected_without_gloo) == [ProcessGroupReducer.__name__] * 2


def _shared() -> list[str]:
    """Return what this process's descriptors of memory and of processes point to."""
    targets: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed, by a thread of torch's
            targets.append(str(descriptor.readlink()))
    # Only those: torch's threads open and close files and sockets of theirs at any time.
    return sorted(target for target in targets if "memfd" in target or "pidfd" in target)


def _left_behind() -> int:
    reducer = _reducer("shared_memory")
    before = _shared()
    reducer.sum(torch.ones(2, dtype=torch.float64))
    assert not list(Path("/dev/shm").glob("*syncbn*"))
    return len(_shared()) - len(before)


def test_nothing_has_a_name_in_the_file_system() -> None:
    # A mapping's own descriptor and one for each peer's process.
    assert run_world(3, _left_behind) == [3, 3, 3]
