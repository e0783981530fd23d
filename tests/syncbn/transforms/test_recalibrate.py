from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.errors import InputError, ReplicaError
from syncbn.transforms.recalibrate import (
    _select_control,  # pyright: ignore[reportPrivateUsage] -- a GPU would be needed to see it
)
from tests.support.world import run_world


def _model(norm: type[nn.Module] = syncbn.SyncBatchNorm) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        norm(3), nn.Linear(3, 4, bias=False), norm(4), nn.Dropout(0.5), nn.Linear(4, 2), norm(2)
    )
    return model.double()


def _batches(rank: int, count: int, seed: int = 0) -> list[Tensor]:
    """Return a rank's batches, whose means differ."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return [
        torch.randn(4 + rank, 3, dtype=torch.float64, generator=generator) + step + rank
        for step in range(count)
    ]


def _expected(counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return mean and variance of what reaches each layer, computed in one process."""
    model = _model(nn.BatchNorm1d)
    model[3].eval()
    reaching: list[list[Tensor]] = [[] for _ in range(3)]
    shares = [_batches(rank, count) for rank, count in enumerate(counts)]
    for step in range(max(counts)):
        hidden = torch.cat([share[step] for share in shares if step < len(share)])
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                reaching[[0, 2, 5].index(list(model).index(module))].append(hidden)
            hidden = module(hidden)
    return [(torch.cat(inputs).mean(0), torch.cat(inputs).var(0)) for inputs in reaching]


def _recalibrated(counts: tuple[int, ...]) -> dict[str, Tensor]:
    model = _model()
    model[5].eval()
    modes = [module.training for module in model.modules()]
    names = syncbn.recalibrate(model, _batches(dist.get_rank(), counts[dist.get_rank()]))
    assert names == ("0", "2", "5")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())  # pyright: ignore[reportPrivateUsage] -- nothing public tells
    assert all(layer.track_running_stats for layer in (model[0], model[2], model[5]))
    assert model[0].num_batches_tracked == max(counts)
    return dict(model.named_buffers())


@pytest.mark.parametrize("counts", [(3,), (2, 2), (3, 1), (1, 4, 2)], ids=str)
def test_statistics_are_those_of_all_batches_of_all_ranks(counts: tuple[int, ...]) -> None:
    ranks = run_world(len(counts), _recalibrated, counts)
    for layer, (mean, variance) in zip((0, 2, 5), _expected(counts), strict=True):
        torch.testing.assert_close(ranks[0][f"{layer}.running_mean"], mean)
        torch.testing.assert_close(ranks[0][f"{layer}.running_var"], variance)
    for other in ranks[1:]:
        assert all(torch.equal(other[name], value) for name, value in ranks[0].items())


def _unsynchronized() -> Tensor:
    layer = nn.BatchNorm1d(3).double()
    rank = dist.get_rank()
    syncbn.recalibrate(layer, [(x, "a label") for x in _batches(rank, rank)])
    assert layer.running_var is not None
    return layer.running_var


def test_unsynchronized_layers_need_not_have_batches_on_every_rank() -> None:
    expected = torch.cat(_batches(1, 1) + _batches(2, 2)).var(0)
    for variance in run_world(3, _unsynchronized):
        torch.testing.assert_close(variance, expected)


def test_float32_far_from_zero_is_exact() -> None:
    x = (1e4 + 1e-2 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))).float()
    layer = nn.BatchNorm1d(3)
    syncbn.recalibrate(layer, x.split(50))
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-6, atol=0)


def test_chosen_layers_alone_are_changed_and_the_others_evaluate() -> None:
    model = _model(nn.BatchNorm1d)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    names = syncbn.recalibrate(model, _batches(0, 2), only=lambda name, layer: name != "0")
    assert names == ("2", "5")
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        assert torch.equal(model.get_buffer(name), before[name])
    hidden = model[1](model[0].eval()(torch.cat(_batches(0, 2))))
    torch.testing.assert_close(model.get_buffer("2.running_mean"), hidden.mean(0))


def test_layer_that_nothing_reaches_keeps_its_statistics() -> None:
    model = _model(nn.BatchNorm1d)
    names = syncbn.recalibrate(model, _batches(0, 2), forward=lambda model, x: model[0](x))  # pyright: ignore[reportIndexIssue] -- a Sequential
    assert names == ("0",)
    assert model.get_buffer("2.running_mean").eq(0).all()


def test_model_without_normalization_is_left_alone() -> None:
    assert syncbn.recalibrate(nn.Linear(3, 2).double(), _batches(0, 1)) == ()


def _breaking(count: int) -> Iterator[Tensor]:
    yield from _batches(0, count)
    raise OSError("disk")


class _BreakingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        raise OSError("disk")


@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        (_model(nn.BatchNorm1d), _breaking(1), OSError, "disk"),
        (_BreakingModel(), _batches(0, 2), OSError, "disk"),
        (_model(nn.BatchNorm1d), [], InputError, "1 of 1 ranks have no batch at all; give every"),
        (_model(nn.BatchNorm1d), [{"x": 1}], InputError, "a batch is a dict whose input is not"),
        (_model(nn.BatchNorm1d), [[]], InputError, "a batch is a list whose input is not"),
    ],
)
def test_failure_leaves_the_model_as_it_was(
    model: nn.Module, batches: Any, error: type[Exception], message: str
) -> None:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(error, match=message):
        syncbn.recalibrate(model, batches)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())  # pyright: ignore[reportPrivateUsage] -- nothing public tells


def test_single_value_is_refused_by_name() -> None:
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    with pytest.raises(InputError, match="more than 1 value"):
        syncbn.recalibrate(model, [torch.zeros(1, 3)])
    evaluated = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="'0' saw a single value"):
        syncbn.recalibrate(evaluated, [torch.zeros(1, 3)], forward=_past_the_check)


def _past_the_check(model: nn.Module, x: Tensor) -> None:
    for hook in model[0]._forward_pre_hooks.values():  # pyright: ignore[reportIndexIssue, reportPrivateUsage] -- as if a layer without torch's check
        hook(model, (x,))


def _failing_on_one_rank(where: str) -> str:
    rank = dist.get_rank()
    batches = {
        "loader": _breaking(1) if rank else iter(_batches(0, 3)),
        "none": _batches(0, 1 - rank),
    }[where]
    error = (OSError if rank else ReplicaError) if where == "loader" else InputError
    with pytest.raises(error) as caught:
        syncbn.recalibrate(_model(), batches)
    return str(caught.value)


def test_failing_loader_of_one_rank_ends_all() -> None:
    other, own = run_world(2, _failing_on_one_rank, "loader", deadline_s=20)
    assert own == "disk"
    assert other.startswith("the batches or the model failed on 1 other ranks")


def test_rank_without_any_batch_ends_all() -> None:
    messages = run_world(2, _failing_on_one_rank, "none", deadline_s=20)
    assert messages[0] == messages[1]
    assert messages[0].startswith("1 of 2 ranks have no batch at all")


def _selected() -> tuple[str, str]:
    gpu = torch.device("cuda", 0)
    with_cpu = _select_control(None, gpu)[1]
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        without = _select_control(None, gpu)[1]
    return with_cpu.type, without.type


def test_host_asks_a_gpu_for_more_batches_only_if_it_must() -> None:
    assert run_world(2, _selected) == [("cpu", "cuda")] * 2
    assert _select_control(None, torch.device("cuda", 0))[1].type == "cpu"


def _on(device: str, counts: tuple[int, ...]) -> dict[str, Tensor]:
    torch.use_deterministic_algorithms(False)  # cuBLAS would need a variable of the environment
    model = _model().to(device)
    batches = _batches(dist.get_rank(), counts[dist.get_rank()])
    syncbn.recalibrate(model, [batch.to(device) for batch in batches])
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", [(3,), (3, 1)], ids=str)
def test_models_and_batches_on_a_gpu_get_the_statistics_of_the_cpu(counts: tuple[int, ...]) -> None:
    expected = run_world(len(counts), _on, "cpu", counts)
    found = run_world(len(counts), _on, "cuda", counts)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
