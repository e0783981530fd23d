"""The layer on one GPU: what it computes, launches, allocates, and never waits for."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.baselines.penalty import StatisticsPenalty
from syncbn.layers.whitening import Method
from tests.support.gpu import DEVICE, needs_gpu, real_gpu

pytestmark = needs_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": ((5, 6, 9, 7), torch.contiguous_format),
    "channels_last": ((5, 6, 9, 7), torch.channels_last),
    "channels_last_3d": ((3, 6, 2, 5, 3), torch.channels_last_3d),
    "of vectors": ((40, 6), torch.contiguous_format),
    "of 16 bytes": ((4, 8, 16, 16), torch.channels_last),
}
FUSED = {"plain": (False, False), "ReLU": (False, True), "residual and ReLU": (True, True)}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
fused = pytest.mark.parametrize(("residual", "relu"), FUSED.values(), ids=FUSED)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> list[Tensor]:
    """Return y, its gradients, and the layer's running statistics."""
    x = x.detach().requires_grad_()
    leaves = [x]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    y = layer(x) if residual is None else layer(x, residual)
    gradients = torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)
    return [y.detach(), *gradients, *layer.buffers()]


class _Truth(nn.BatchNorm1d):
    """In float64, on the CPU, of any number of axes."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__(channels, dtype=torch.float64)
        self.relu = relu

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        y = y if residual is None else y + residual
        return y.relu() if self.relu else y


@dtypes
@layouts
@fused
def test_layer_computes_what_float64_does(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    residual: bool,
    relu: bool,
) -> None:
    x, other, dy = (
        (_random(seed, *shape) + 2).to(dtype).contiguous(memory_format=layout) for seed in range(3)
    )
    layer = syncbn.SyncBatchNorm(shape[1], relu=relu, device=DEVICE)
    truth = _Truth(shape[1], relu)
    for module in (layer, truth):
        with torch.no_grad():
            module.weight.copy_(_random(3, shape[1]).abs() + 0.5)
            module.bias.copy_(_random(4, shape[1]))
    there = other.to(DEVICE) if residual else None
    results = _step(layer, x.to(DEVICE), there, dy.to(DEVICE))
    expected = _step(truth, x.double(), other.double() if residual else None, dy.double())
    for result, exact in zip(results, expected, strict=True):
        # A few roundings of the largest, in the dtype, or in float32 for sums of some 300.
        bound = 8 * torch.finfo(result.dtype if result.is_floating_point() else torch.float32).eps
        scale = exact.abs().max().item() + 1
        torch.testing.assert_close(
            result.cpu().double(), exact.double(), rtol=0, atol=bound * scale
        )
    assert results[0].is_contiguous(memory_format=layout)


def test_results_are_the_same_from_run_to_run() -> None:
    x, dy = (_random(seed, 16, 12, 30, 30).to(DEVICE) for seed in range(2))
    layers = [syncbn.SyncBatchNorm(12, device=DEVICE) for _ in range(2)]
    for one, other in zip(*(_step(layer, x, None, dy) for layer in layers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e6), (torch.bfloat16, 100.0)])
def test_variance_far_from_0_keeps_its_digits(
    dtype: torch.dtype, mean: float, layout: torch.memory_format
) -> None:
    x = (_random(0, 16, 3, 40, 40).double() + mean).to(dtype).contiguous(memory_format=layout)
    exact = x.double().var((0, 2, 3), correction=0)
    for _ in range(2):  # cold and warm
        moments = syncbn.sync_batch_norm(x.to(DEVICE))[1]
        torch.testing.assert_close(moments.variance().cpu(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1, 3])
@dtypes
def test_misaligned_storage_is_read_where_it_is(dtype: torch.dtype, offset: int) -> None:
    shape = (4, 8, 4, 4)
    size = torch.Size(shape).numel()
    storage = torch.full((size + 8,), torch.nan, dtype=dtype, device=DEVICE)
    x = storage[offset : offset + size].view(shape).copy_(_random(0, *shape))
    layer = syncbn.SyncBatchNorm(8, device=DEVICE)
    dy = torch.ones_like(x)
    again = copy.deepcopy(layer)
    for one, other in zip(
        _step(layer, x, None, dy), _step(again, x.clone(), None, dy), strict=True
    ):
        assert torch.equal(one, other)


@real_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_2_to_the_31_values_are_normalized(layout: torch.memory_format) -> None:
    shape = (2**15 + 1, 16, 64, 64)
    if torch.cuda.mem_get_info()[0] < 5 * 2 * torch.Size(shape).numel():
        pytest.skip("needs 22 GB of a GPU's memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=layout)
    x[-1] = 1
    layer = syncbn.SyncBatchNorm(16, device=DEVICE, eps=1e-5)
    y = layer(x.requires_grad_())
    share = 1 / shape[0]
    invstd = (share * (1 - share) + 1e-5) ** -0.5
    torch.testing.assert_close(y[-1].float(), torch.full_like(y[-1], (1 - share) * invstd).float())
    torch.testing.assert_close(y[0].float(), torch.full_like(y[0], -share * invstd).float())
    assert torch.equal(y[0], y[-2])
    y.backward(x.detach())
    assert x.grad is not None
    assert torch.equal(x.grad[0], x.grad[-2])


@real_gpu
@fused
def test_training_never_waits_for_the_gpu(residual: bool, relu: bool) -> None:
    layer = syncbn.SyncBatchNorm(8, relu=relu, device=DEVICE)
    x, other, dy = (_random(seed, 4, 8, 6, 6).to(DEVICE) for seed in range(3))
    _step(layer, x, other if residual else None, dy)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(layer, x, other if residual else None, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@real_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_launches_nine_kernels(layout: torch.memory_format) -> None:
    layer = syncbn.SyncBatchNorm(64, relu=True, device=DEVICE)
    x, dy = (_random(seed, 64, 64, 28, 28).to(DEVICE, memory_format=layout) for seed in range(2))
    x.requires_grad_()
    torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() or [] if event.device_type.name == "CUDA"]
    assert len(launched) <= 9, launched


@real_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_needs_less_than_a_megabyte_besides_its_results(
    layout: torch.memory_format,
) -> None:
    layer = syncbn.SyncBatchNorm(256, relu=True, device=DEVICE)
    x, dy = (_random(seed, 16, 256, 28, 28).to(DEVICE, memory_format=layout) for seed in range(2))
    x.requires_grad_()
    torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], dy)
    peak = torch.cuda.max_memory_allocated() - before
    results = 2 * x.numel() * x.element_size()
    assert peak - results < 2**20


@real_gpu
def test_a_captured_step_replays_to_the_same_bits() -> None:
    x, dy = (_random(seed, 8, 16, 12, 12).to(DEVICE) for seed in range(2))
    x.requires_grad_()
    eager, captured = (syncbn.SyncBatchNorm(16, relu=True, device=DEVICE) for _ in range(2))

    def step(layer: nn.Module) -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured)
    torch.cuda.current_stream().wait_stream(side)
    captured.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(captured)
    for seed in range(3):
        with torch.no_grad():
            x.copy_(_random(10 + seed, *x.shape))
        graph.replay()
        for ours, expected in zip(replayed, step(eager), strict=True):
            assert torch.equal(ours, expected)
        for ours, expected in zip(captured.buffers(), eager.buffers(), strict=True):
            assert torch.equal(ours, expected)


@real_gpu
def test_graphed_callables_train() -> None:
    x = _random(0, 8, 16, 12, 12).to(DEVICE).requires_grad_()
    eager = syncbn.SyncBatchNorm(16, device=DEVICE)
    graphed: Any = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (x.clone(),))
    dy = torch.randn_like(x)
    for ours, expected in zip(
        torch.autograd.grad(graphed(x), [x, *graphed.parameters()], dy),
        torch.autograd.grad(eager(x), [x, *eager.parameters()], dy),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@real_gpu
def test_inputs_made_on_a_side_stream_are_waited_for() -> None:
    layer = syncbn.SyncBatchNorm(16, device=DEVICE)
    x = _random(0, 64, 16, 56, 56).to(DEVICE)
    expected = copy.deepcopy(layer)(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # pyright: ignore[reportPrivateUsage] -- nothing public is slow
        made = x.clone()
        y = layer(made)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(y, expected)


@real_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_computes_the_same(mode: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), syncbn.SyncBatchNorm(16, relu=True), nn.Conv2d(16, 4, 3)
    ).to(DEVICE)
    eager = copy.deepcopy(model)
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(4):
        x = _random(seed, 8, 3, 16, 16).to(DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        results: list[list[Tensor]] = []
        for module in (compiled, eager):
            module.zero_grad()
            module(x).square().mean().backward()
            results.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)  # convolutions may use TF32
    torch.testing.assert_close(list(model.buffers()), list(eager.buffers()), rtol=1e-3, atol=1e-4)


def test_autocast_keeps_the_dtype_of_the_input() -> None:
    layer = syncbn.SyncBatchNorm(8, device=DEVICE)
    x = _random(0, 4, 8, 5, 5).to(DEVICE, torch.bfloat16).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@real_gpu
@pytest.mark.parametrize("case", ["float64", "strides"])
def test_what_the_kernels_do_not_take_is_computed_and_logged_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = _random(0, 4, 8, 5, 6).to(DEVICE)
    x = x.double() if case == "float64" else x.transpose(2, 3)
    layer = syncbn.SyncBatchNorm(8, device=DEVICE)
    with caplog.at_level(logging.WARNING, "syncbn"):
        layer(x)
        y = layer(x)
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert [str(x.dtype) in record.getMessage() for record in caplog.records] in ([True], [])


def _on_both(make: Callable[[], nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    here = make()
    there = copy.deepcopy(here).to(DEVICE)
    return here(x), there(x.to(DEVICE)).cpu()


@pytest.mark.parametrize("method", ["zca", "newton"])
def test_whitening_computes_what_the_cpu_does(method: Method) -> None:
    x = _random(0, 16, 8, 5, 5)

    def make() -> nn.Module:
        return syncbn.SyncWhitening(8, group_size=4, method=method)

    torch.testing.assert_close(*_on_both(make, x), rtol=1e-4, atol=1e-4)


def test_renormalized_model_recalibrates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8))
    there = copy.deepcopy(model).to(DEVICE)
    batches = [_random(seed, 6, 3, 8, 8) for seed in range(3)]
    for module in (model, there):
        assert syncbn.recalibrate(module, batches) == ("1",)
    for here, gpu in zip(model.buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(gpu.cpu(), here, rtol=1e-3, atol=1e-3)  # TF32


def test_penalty_is_that_of_the_cpu() -> None:
    def penalty(device: torch.device) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).to(device)
        watching = StatisticsPenalty({"0": model[0]}, 0.5)
        with watching.watch():
            model(_random(0, 16, 4).to(device))
        return watching.value().detach().cpu()

    torch.testing.assert_close(penalty(DEVICE), penalty(torch.device("cpu")), rtol=1e-4, atol=0)


def test_fused_model_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8), nn.ReLU()).to(DEVICE)
    fusion = syncbn.fuse(copy.deepcopy(model))
    x = _random(0, 6, 3, 8, 8).to(DEVICE)
    torch.testing.assert_close(fusion.model(x), model(x))
