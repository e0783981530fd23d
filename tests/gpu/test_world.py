"""Two ranks, which share one GPU by way of gloo: what they compute, and how errors come out."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.errors import ReplicaError
from tests.support.gpu import DEVICE, needs_gpu, real_gpu
from tests.support.world import run_world

pytestmark = needs_gpu

ROWS = {"even": (3, 3), "uneven": (1, 5), "empty": (0, 4)}
CHANNELS = 5


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


def _computes(rows: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, dy = (
        (_random(seed, sum(rows), CHANNELS, 4, 3) + 3).to(dtype).contiguous(memory_format=layout)
        for seed in range(2)
    )
    truth = nn.BatchNorm2d(CHANNELS).double()
    layer = syncbn.SyncBatchNorm(CHANNELS, device=DEVICE)
    start = sum(rows[: dist.get_rank()])
    mine = slice(start, start + rows[dist.get_rank()])
    _step(truth, x.double(), dy.double())
    _step(layer, x[mine].to(DEVICE), dy[mine].to(DEVICE))  # so that the next one is warm
    for parameter in (*truth.parameters(), *layer.parameters()):
        parameter.grad = None
    expected = _step(truth, x.double(), dy.double())
    results = _step(layer, x[mine].to(DEVICE), dy[mine].to(DEVICE))
    bound = 64 * torch.finfo(dtype).eps
    for result, whole in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), whole[mine], rtol=0, atol=bound)
    for parameter, other in zip(layer.parameters(), truth.parameters(), strict=True):
        assert parameter.grad is not None
        total = parameter.grad.cpu()
        dist.all_reduce(total)
        assert other.grad is not None
        torch.testing.assert_close(total.double(), other.grad, rtol=bound, atol=bound)
    for buffer, other in zip(layer.buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(buffer.cpu().double(), other.double(), rtol=1e-6, atol=1e-6)
        everyone = [torch.empty_like(buffer.cpu()) for _ in range(2)]
        dist.all_gather(everyone, buffer.cpu())
        assert torch.equal(*everyone)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_two_ranks_compute_what_one_process_computes(
    rows: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    run_world(2, _computes, rows, dtype, layout, deadline_s=300)


def _swapped() -> tuple[bool, str]:
    first, second = (syncbn.SyncBatchNorm(CHANNELS, device=DEVICE) for _ in range(2))
    x = _random(dist.get_rank(), 4, CHANNELS, 3).to(DEVICE)
    first(x)
    second(x + 1)
    mine = second if dist.get_rank() else first
    y = mine(x)
    with mock.patch.dict(os.environ, SYNCBN_DEBUG_TIMEOUT_S="20"):
        net = nn.ModuleDict({"first": first, "second": second})
        with pytest.raises(ReplicaError) as caught:
            mine(x)
        assert net
    return bool(y.isnan().all()), str(caught.value)


@real_gpu
def test_layers_in_another_order_give_nan_and_their_names_if_asked() -> None:
    for is_nan, message in run_world(2, _swapped, deadline_s=300):
        assert is_nan
        assert "rank 0 is at the forward of 'first'" in message
        assert "rank 1 is at the forward of 'second'" in message


def _launches() -> list[str]:
    layer = syncbn.SyncBatchNorm(64, relu=True, device=DEVICE)
    x = _random(0, 32, 64, 14, 14).to(DEVICE).requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or []]
    return [name for name in names if "LaunchKernel" in name or "c10d::" in name]


@real_gpu
def test_a_step_of_two_ranks_launches_at_most_twelve() -> None:
    for names in run_world(2, _launches, deadline_s=300):
        # And the ones that are the gradient of the output here.
        assert len(names) <= 12 + 1, names
