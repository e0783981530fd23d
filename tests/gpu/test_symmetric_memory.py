"""The exchange through peers' memory: a rank for each GPU, or two that share the only one."""

import os
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from syncbn.comm.reducer import SymmetricMemoryReducer, select_reducer
from tests.support.gpu import needs_gpu, real_gpu
from tests.support.peers import exchange, poll_less, share
from tests.support.world import run_world

pytestmark = [*needs_gpu, real_gpu]


def _with_reducer(check: Callable[[SymmetricMemoryReducer, torch.device], None]) -> None:
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    with mock.patch.dict(os.environ, TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"):
        reducer = select_reducer(None, device, "symmetric_memory")
        assert isinstance(reducer, SymmetricMemoryReducer)
        check(reducer, device)
        torch.cuda.synchronize()
        dist.barrier()


def _calls(reducer: SymmetricMemoryReducer, device: torch.device) -> None:
    for call in range(200):
        exchange(reducer, call, (0, 1, 7, 1030, 4098, 20000)[call % 6], device)


def _captured(reducer: SymmetricMemoryReducer, device: torch.device) -> None:
    vector = share(reducer.rank, 0, 100, device)
    reducer.sum(vector)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = reducer.sum(vector)
    for call in range(20):
        everyone = [share(rank, call, 100, device) for rank in range(reducer.world_size)]
        vector.copy_(everyone[reducer.rank])
        graph.replay()
        expected = everyone[0]
        for theirs in everyone[1:]:
            expected = expected + theirs
        assert torch.equal(total, expected)
        exchange(reducer, call, 7, device)


def _stays_away(reducer: SymmetricMemoryReducer, device: torch.device) -> None:
    exchange(reducer, 0, 5, device)
    poll_less(reducer, 10**6)
    if reducer.rank > 0:
        dist.barrier()  # until rank 0 has given up
    rows = reducer.gather(share(reducer.rank, 1, 5, device))
    assert rows[reducer.rank].isfinite().all()
    assert rows.isnan().any() == (reducer.rank == 0)
    assert reducer.sum(rows[reducer.rank]).isnan().all()
    if reducer.rank == 0:
        dist.barrier()


@pytest.mark.parametrize("check", [_calls, _captured, _stays_away])
def test_ranks_reach_each_others_memory(
    check: Callable[[SymmetricMemoryReducer, torch.device], None],
) -> None:
    world_size = min(max(torch.cuda.device_count(), 2), 8)
    run_world(world_size, _with_reducer, check, deadline_s=300)
