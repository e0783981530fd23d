"""What every reducer must do, on every rank of worlds of 1 to 4."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives import ProcessGroupReducer, SingleReplica, select_reducer
from tests.support.world import run_world

SIZES = [1, 7, 129, 4097]


def _share(rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _sum_each_size() -> list[Tensor]:
    reducer = select_reducer(None)
    sums: list[Tensor] = []
    for size in SIZES:
        vector = _share(dist.get_rank(), size)
        before = vector.clone()
        sums.append(reducer.sum(vector))
        assert torch.equal(vector, before)
    return sums


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_bit_identical_on_all_ranks_and_from_run_to_run(world_size: int) -> None:
    runs = run_world(world_size, _sum_each_size) + run_world(world_size, _sum_each_size)
    for number, size in enumerate(SIZES):
        expected = torch.stack([_share(rank, size) for rank in range(world_size)]).sum(0)
        torch.testing.assert_close(runs[0][number], expected, rtol=1e-13, atol=1e-13)
        for sums in runs:
            assert torch.equal(sums[number], runs[0][number])


def _sum_in_pairs() -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[dist.get_rank() // 2]
    assert isinstance(mine, dist.ProcessGroup)
    reducer = select_reducer(mine)
    assert reducer.world_size == 2
    return reducer.sum(torch.tensor([float(dist.get_rank())])).item()


def test_disjoint_groups_sum_apart() -> None:
    assert run_world(4, _sum_in_pairs) == [1.0, 1.0, 5.0, 5.0]


def _selected() -> str:
    return type(select_reducer(None)).__name__


def test_reducer_is_chosen_by_world_size() -> None:
    assert isinstance(select_reducer(None), SingleReplica)
    assert run_world(1, _selected) == [SingleReplica.__name__]
    assert run_world(2, _selected) == [ProcessGroupReducer.__name__] * 2
