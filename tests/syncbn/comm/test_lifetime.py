"""No process group, and no thread of one, outlives destroy_process_group because of us."""

import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.comm import shared_memory
from syncbn.comm.reducer import select_reducer
from syncbn.errors import ReplicaError
from tests.support.world import run_world

ONES = torch.ones(3, dtype=torch.float64)
# Which host each rank pretends to be on: all on one; one rank each, so that there is no memory to
# share; several, whose first ranks connect to each other.
HOSTS = pytest.mark.parametrize("hosts", [[1, 1], [1, 2], [1, 1, 2]], ids=str)


def _gloo_threads() -> int:
    names: list[str] = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):  # gone since it was listed
            names.append(path.read_text().strip())
    return names.count("pt_gloo_runloop")


def _gloo_threads_become(count: int) -> bool:
    """Return whether so many are left, once the kernel has taken those away that were joined."""
    deadline = time.monotonic() + 5
    while _gloo_threads() != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return _gloo_threads() == count


def _pretend(hosts: list[int]) -> None:
    host = hosts[dist.get_rank()]
    shared_memory.host = lambda: host  # one machine plays several


def _loss(group: dist.ProcessGroup | None) -> torch.Tensor:
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    loss = layer(torch.randn(4, 2, requires_grad=True)).square().sum()
    loss.backward()
    return loss


def _destroy_subgroups(hosts: list[int], times: int) -> None:
    _pretend(hosts)
    dist.barrier()  # a thread gives itself its name once it runs
    before = _gloo_threads()
    for _ in range(times):
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        reducers = [select_reducer(group, None, each) for each in ("auto", "process_group")]
        for reducer in reducers:
            assert reducer.sum(ONES).tolist() == [float(len(hosts))] * 3
        loss = _loss(group)
        alive = weakref.ref(group)
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        assert alive() is None
        assert _gloo_threads_become(before)
        for reducer in reducers:  # and the graph of the loss holds one as well
            with pytest.raises(ReplicaError, match="has been destroyed"):
                _ = reducer.group
        del loss
    dist.barrier()  # the default group goes on
    assert select_reducer(None).sum(ONES).tolist() == [float(len(hosts))] * 3


@HOSTS
def test_destroyed_subgroup_leaves_no_thread(hosts: list[int]) -> None:
    run_world(len(hosts), _destroy_subgroups, hosts, 3)


@pytest.mark.long
def test_group_can_be_made_again_sixty_times() -> None:
    run_world(3, _destroy_subgroups, [1, 1, 2], 60, deadline_s=120)


def _destroy_all(hosts: list[int]) -> None:
    _pretend(hosts)
    groups = [dist.group.WORLD, dist.new_group(), dist.new_group([1, 0])]
    mine = [group for group in groups if isinstance(group, dist.ProcessGroup)]
    reducers = [select_reducer(group) for group in mine]
    for reducer in reducers:
        assert reducer.sum(ONES).tolist() == [float(reducer.world_size)] * 3
    losses = [_loss(group) for group in mine]
    alive = [weakref.ref(group) for group in mine]
    dist.barrier()
    dist.destroy_process_group()
    del groups, mine
    assert [ref() for ref in alive] == [None] * len(alive)
    assert _gloo_threads_become(0)
    del losses


@HOSTS
def test_destroying_all_groups_leaves_no_thread(hosts: list[int]) -> None:
    run_world(len(hosts), _destroy_all, hosts)
