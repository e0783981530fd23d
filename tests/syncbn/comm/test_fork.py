"""A forked child inherits its parent's process groups, and must not speak for it."""

import multiprocessing
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import syncbn
from syncbn.comm.reducer import Reducer, select_reducer
from syncbn.errors import ReplicaError
from tests.support.forked import in_forked_child
from tests.support.world import run_world

CPU = torch.device("cpu")
ONES = torch.ones(5, dtype=torch.float64)
refused = pytest.raises(ReplicaError, match=r"forked.*eval mode.*spawn")


def _sum(reducer: Reducer) -> list[float]:
    return reducer.sum(ONES).tolist()


def _sum_in_child(choice: str, summed_before: bool, depth: int) -> None:
    reducer = select_reducer(None, CPU, choice)
    if summed_before:
        reducer.sum(ONES)

    def in_child(depth: int) -> None:
        if depth > 1:
            in_forked_child(lambda: in_child(depth - 1))
        with refused:
            reducer.sum(ONES)
        with refused:
            select_reducer(None, CPU, choice)
        with refused:  # the group's other reducer too
            select_reducer(None, CPU, "process_group")

    if dist.get_rank() == 0:
        in_forked_child(lambda: in_child(depth))
    for _ in range(3):
        assert _sum(reducer) == [2.0] * 5
    in_forked_child(lambda: in_child(1))
    assert _sum(reducer) == [2.0] * 5


@pytest.mark.parametrize("choice", ["shared_memory", "process_group"])
@pytest.mark.parametrize("summed_before", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_forked_child_may_not_sum_and_its_parents_go_on(
    choice: str, summed_before: bool, depth: int
) -> None:
    run_world(2, _sum_in_child, choice, summed_before, depth)


def _select_first_in_child() -> None:
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    for choice in ("auto", "process_group"):
        for each in (None, group):

            def select(each: dist.ProcessGroup | None = each, choice: str = choice) -> None:
                with refused:
                    select_reducer(each, CPU, choice)

            in_forked_child(select)
    assert _sum(select_reducer(group)) == [2.0] * 5


def test_group_that_its_parent_never_summed_over_is_refused_too() -> None:
    run_world(2, _select_first_in_child)


class _Normalized(Dataset[torch.Tensor]):
    """Normalizes each sample, wrongly in training mode."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((3, 2), float(index)))


def _load_with_a_layer(training: bool) -> list[float]:
    layer = syncbn.SyncBatchNorm(2)
    x = torch.arange(6.0).reshape(3, 2)
    layer(x)
    dataset = _Normalized(layer.train(training))
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="fork")
    config = multiprocessing.current_process()._config  # pyright: ignore[reportAttributeAccessIssue] -- the harness's ranks are daemons, which may not have children
    with mock.patch.dict(config, daemon=False):
        if training:
            with refused:
                list(loader)
        else:
            assert len(list(loader)) == 4
    layer.train()(x)
    assert layer.running_mean is not None
    return layer.running_mean.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_layer_in_a_forked_loader_worker_normalizes_in_eval_mode_only(training: bool) -> None:
    means = run_world(2, _load_with_a_layer, training)
    assert means[0] == means[1] == pytest.approx([2.0 * 0.19, 3.0 * 0.19])
