import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.errors import InputError
from tests.support.one_process import (
    CHANNELS,
    Case,
    Outcome,
    in_one_process,
    initialize,
    outcome,
    plain_norm,
    rows,
)
from tests.support.tolerance import assert_as_exact
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

EVEN = {
    1: ((6, CHANNELS, 4),),
    2: ((4, CHANNELS, 5), (4, CHANNELS, 5)),
    3: ((2, CHANNELS), (2, CHANNELS), (2, CHANNELS)),
    4: ((2, CHANNELS, 3, 2),) * 4,
}
CASES = {
    **{f"world of {size}": Case(shapes) for size, shapes in EVEN.items()},
    "float64": Case(EVEN[2], torch.float64),
    "bfloat16": Case(EVEN[2], torch.bfloat16),
    "float16": Case(EVEN[2], torch.float16),
    "channels last": Case(EVEN[4], layout=torch.channels_last),
    "channels last 3-D": Case(((2, CHANNELS, 2, 3, 2),) * 2, layout=torch.channels_last_3d),
    "strides of a slice": Case(EVEN[4], layout=None),
    "parameters in float64": Case(EVEN[2], parameters=torch.float64),
    "parameters in bfloat16": Case(EVEN[2], parameters=torch.bfloat16),
    "5-D": Case(((2, CHANNELS, 2, 2, 2),) * 2),
    "uneven batches": Case(((5, CHANNELS, 4), (2, CHANNELS, 4), (1, CHANNELS, 4))),
    "uneven images": Case(((2, CHANNELS, 4, 4), (2, CHANNELS, 2, 3))),
    "one sample a rank": Case(((1, CHANNELS), (1, CHANNELS))),
    "an empty rank": Case(((4, CHANNELS, 2), (0, CHANNELS, 2))),
    "an empty rank in float16": Case(((4, CHANNELS, 2), (0, CHANNELS, 2)), torch.float16),
    "an empty rank in bfloat16": Case(((4, CHANNELS, 2), (0, CHANNELS, 2)), torch.bfloat16),
    "an empty rank in float64": Case(((0, CHANNELS, 2), (4, CHANNELS, 2)), torch.float64),
    "cumulative average": Case(EVEN[2], options={"momentum": None}),
    "no running statistics": Case(EVEN[2], options={"track_running_stats": False}),
    "not affine": Case(EVEN[2], options={"affine": False}),
    "no bias": Case(EVEN[2], options={"bias": False}),
    "ReLU": Case(EVEN[2], relu=True),
    "ReLU in bfloat16": Case(EVEN[2], torch.bfloat16, relu=True),
    "ReLU in float64": Case(EVEN[2], torch.float64, relu=True),
    "ReLU, not affine": Case(EVEN[2], options={"affine": False}, relu=True),
    "ReLU, parameters in float64": Case(EVEN[2], parameters=torch.float64, relu=True),
    "ReLU, strides of a slice": Case(EVEN[4], layout=None, relu=True),
    "ReLU, channels last": Case(EVEN[4], layout=torch.channels_last, relu=True),
    "ReLU, an empty rank": Case(((4, CHANNELS, 2), (0, CHANNELS, 2)), relu=True),
    "residual": Case(EVEN[2], residual=True),
    "residual, channels last": Case(EVEN[4], layout=torch.channels_last, residual=True),
    "residual and ReLU": Case(EVEN[4], residual=True, relu=True),
    "residual and ReLU in float16": Case(EVEN[2], torch.float16, residual=True, relu=True),
    "residual and ReLU in float64": Case(EVEN[2], torch.float64, residual=True, relu=True),
    "residual and ReLU, channels last": Case(
        EVEN[4], layout=torch.channels_last, residual=True, relu=True
    ),
}


def _train(case: Case) -> Outcome:
    layer = syncbn.SyncBatchNorm(CHANNELS, relu=case.relu, **case.options)
    initialize(layer)
    layer.to(case.parameters or case.layer_dtype(case.dtype))
    ys: list[Tensor] = []
    dxs: list[Tensor] = []
    dresiduals: list[Tensor] = []
    for step in range(case.steps):
        x, dy, residual = case.share(dist.get_rank(), step)
        x.requires_grad_()
        residual.requires_grad_()
        y: Tensor = layer(x, residual if case.residual else None)
        y.backward(dy)
        if case.residual:
            assert residual.grad is not None
            dresiduals.append(rows(residual.grad))
        assert x.grad is not None
        assert y.dtype == x.dtype
        if case.layout is not None:
            assert y.stride() == x.grad.stride() == x.stride()
        ys.append(rows(y.detach()))
        dxs.append(rows(x.grad))
    return outcome(layer, ys, dxs, dresiduals)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replicas_match_one_process_on_the_concatenated_batch(case: Case) -> None:
    ours = run_world(len(case.shapes), _train, case)
    truth = in_one_process(case, torch.float64)
    # In float64 too there is an error to measure by: that of another order of summation.
    plain = in_one_process(case, case.dtype, reverse=True)
    for step in range(case.steps):
        for what in ("y", "dx", "dresidual") if case.residual else ("y", "dx"):
            joined = torch.cat([getattr(rank, what)[step] for rank in ours])
            assert_as_exact(joined, getattr(truth, what)[step], getattr(plain, what)[step], what)
    for name, gradient in truth.gradients.items():
        summed = torch.stack([rank.gradients[name] for rank in ours]).sum(0)
        assert_as_exact(summed, gradient, plain.gradients[name], f"gradient of {name}")
    for name, value in truth.state.items():
        for rank in ours:
            assert torch.equal(rank.state[name], ours[0].state[name]), f"{name} differs by rank"
        if value.is_floating_point():
            assert_as_exact(ours[0].state[name], value, plain.state[name], name)
        else:
            assert ours[0].state[name] == value


def _collectives(training: bool) -> list[tuple[int, torch.dtype]]:
    layer = syncbn.SyncBatchNorm(CHANNELS).train(training)
    x = torch.randn(4, CHANNELS, 2, requires_grad=True)
    with recorded_all_reduces() as sent:
        layer(x).sum().backward()
    return [(vector.numel(), vector.dtype) for vector in sent]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_all_reduce_forward_and_one_backward(world_size: int) -> None:
    forward, backward = (2 * CHANNELS + 1, torch.float64), (2 * CHANNELS, torch.float64)
    expected = [forward, backward] if world_size > 1 else []
    assert run_world(world_size, _collectives, True) == [expected] * world_size


def test_evaluation_does_not_communicate() -> None:
    assert run_world(2, _collectives, False) == [[], []]


def _single_value() -> str:
    rank = dist.get_rank()
    layer = syncbn.SyncBatchNorm(CHANNELS)
    with pytest.raises(InputError) as caught:
        layer(torch.randn(1 if rank == 0 else 0, CHANNELS))
    assert layer.num_batches_tracked == 0
    return str(caught.value)


def test_single_value_over_all_ranks_raises_the_same_on_every_rank() -> None:
    messages = run_world(2, _single_value)
    assert "more than 1 value per channel" in messages[0]
    assert messages[0] == messages[1]


def _nothing_anywhere() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.empty(0, CHANNELS, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros(CHANNELS))


def test_no_samples_anywhere_change_nothing() -> None:
    run_world(2, _nothing_anywhere)


def _gradient_projections() -> tuple[Tensor, Tensor, Tensor]:
    case = Case(((8, CHANNELS, 3), (5, CHANNELS, 2)), torch.float64)
    x, dy, _ = case.share(dist.get_rank(), 0)
    x.requires_grad_()
    layer = syncbn.SyncBatchNorm(CHANNELS, eps=0.0, affine=False).double()
    xhat: Tensor = layer(x)
    xhat.backward(dy)
    assert x.grad is not None
    return rows(x.grad).sum(0), rows(x.grad * xhat.detach()).sum(0), rows(x.grad).abs().sum(0)


def test_input_gradient_has_no_component_along_one_and_along_the_normalized_input() -> None:
    along_one, along_xhat, size = (
        torch.stack(parts).sum(0)
        for parts in zip(*run_world(2, _gradient_projections), strict=True)
    )
    assert (along_one.abs() <= 1e-13 * size).all()
    assert (along_xhat.abs() <= 1e-13 * size).all()


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_is_that_of_torch(track: bool) -> None:
    ours = syncbn.SyncBatchNorm(CHANNELS, track_running_stats=track)
    theirs = nn.BatchNorm2d(CHANNELS, track_running_stats=track)
    for layer in (ours, theirs):
        initialize(layer)
        layer(torch.arange(48.0).reshape(2, CHANNELS, 4, 2))
        layer.eval()
    x = torch.randn(2, CHANNELS, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "theirs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_state_dicts_interchange_with_torch(
    theirs: type[nn.BatchNorm2d], options: dict[str, Any]
) -> None:
    one, other = plain_norm(theirs, **options), syncbn.SyncBatchNorm(CHANNELS, **options)
    initialize(one)
    other.load_state_dict(one.state_dict())
    plain_norm(theirs, **options).load_state_dict(other.state_dict())
    assert list(one.state_dict()) == list(other.state_dict())


def test_reset_restores_a_new_layer() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS, bias=False)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    initialize(layer)
    layer(torch.randn(4, CHANNELS))
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, fresh[name]), name


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"\(N, 3, \*\), got \(4,\)"),
        (torch.zeros(2, 4, 5), r"\(N, 3, \*\), got \(2, 4, 5\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"floating-point input, got torch.int64"),
    ],
)
def test_unfit_input_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        syncbn.SyncBatchNorm(CHANNELS)(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (3, 1)])
def test_parameter_that_does_not_fit_the_channels_is_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    message = rf"a {name} of shape \(3,\) like the input's channels, got {re.escape(str(shape))}"
    x = torch.zeros(2, 3)
    for track in (True, False):
        layer = syncbn.SyncBatchNorm(CHANNELS, track_running_stats=track)
        setattr(layer, name, nn.Parameter(torch.ones(shape)))
        with pytest.raises(InputError, match=message):
            layer(x)
    with pytest.raises(InputError, match=message):
        layer.eval()(x)
    unfit: dict[str, Any] = {name: torch.ones(shape)}
    with pytest.raises(InputError, match=message):
        syncbn.sync_batch_norm(x, **unfit)


def _partly_frozen(frozen: str) -> list[tuple[int, ...]]:
    """Return what is sent, having checked the gradients that are left against one process."""
    x = torch.randn(4, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, truth = syncbn.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)
    gradients: list[list[Tensor | None]] = []
    with recorded_all_reduces() as sent:
        for layer, share in ((ours, x.chunk(2)[dist.get_rank()]), (truth, x)):
            initialize(layer.double())
            of_input = share.clone().requires_grad_(frozen != "input")
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(frozen != name)
            layer(of_input).pow(3).sum().backward()
            gradients.append([of_input.grad, *(parameter.grad for parameter in layer.parameters())])
    of_input = gradients[1][0]
    if of_input is not None:
        gradients[1][0] = of_input.chunk(2)[dist.get_rank()]
    for mine in gradients[0][1:]:
        if mine is not None:
            dist.all_reduce(mine)
    torch.testing.assert_close(gradients[0], gradients[1])
    return [tuple(vector.shape) for vector in sent]


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_needs_no_gradient_gets_none_and_sends_nothing(frozen: str) -> None:
    expected = [(2 * CHANNELS + 1,), (2 * CHANNELS,)][: 1 if frozen == "input" else 2]
    assert run_world(2, _partly_frozen, frozen) == [expected] * 2


def _under_autocast(dtype: torch.dtype) -> None:
    linear, layer = nn.Linear(5, CHANNELS), syncbn.SyncBatchNorm(CHANNELS)
    x = 100 + torch.randn(64, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.autocast("cpu", dtype):
        hidden = linear(x)
        y = layer(hidden)
    assert hidden.dtype == y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.running_mean is not None
    assert layer.running_mean.dtype == torch.float32
    everything = [torch.empty_like(hidden) for _ in range(dist.get_world_size())]
    dist.all_gather(everything, hidden.detach())
    mean = 0.1 * torch.cat(everything).double().mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_inputs_and_statistics_in_float32(dtype: torch.dtype) -> None:
    run_world(2, _under_autocast, dtype)


def _in_disjoint_groups() -> Tensor:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[dist.get_rank() // 2]
    assert isinstance(group, dist.ProcessGroup)
    layer = syncbn.SyncBatchNorm(1, process_group=group, momentum=1.0)
    layer(torch.full((2, 1), float(dist.get_rank())))
    assert layer.running_mean is not None
    return layer.running_mean


def test_disjoint_groups_normalize_apart() -> None:
    assert torch.cat(run_world(4, _in_disjoint_groups)).tolist() == [0.5, 0.5, 2.5, 2.5]


def _with_assigned_state() -> None:
    layer, source = syncbn.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)
    layer(torch.randn(4, CHANNELS))
    initialize(source)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        layer(x.chunk(2)[dist.get_rank()]), source(x).chunk(2)[dist.get_rank()]
    )
    torch.testing.assert_close(layer.state_dict(), source.state_dict())


def test_assigned_weights_and_buffers_are_used_and_moved() -> None:
    run_world(2, _with_assigned_state)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("parameters", [torch.float64, torch.bfloat16, torch.float16])
def test_evaluation_takes_parameters_of_another_dtype(parameters: torch.dtype, track: bool) -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS, track_running_stats=track, dtype=parameters)
    initialize(layer)
    torch.manual_seed(0)
    layer(torch.randn(9, CHANNELS))
    layer.eval()
    x = torch.randn(4, CHANNELS, requires_grad=True)
    y = layer(x)
    y.pow(3).sum().backward()
    truth = nn.BatchNorm1d(CHANNELS, track_running_stats=track).double()
    truth.load_state_dict(layer.state_dict())
    truth.eval()
    wide = x.detach().double().requires_grad_()
    truth(wide).pow(3).sum().backward()
    # The input's dtype, float32, rounds; the truth is float64.
    torch.testing.assert_close(y, truth(wide), check_dtype=False)
    torch.testing.assert_close(x.grad, wide.grad, check_dtype=False)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == parameters


def _trained(kernels: str) -> list[Tensor]:
    os.environ["SYNCBN_KERNELS"] = kernels
    layer = syncbn.SyncBatchNorm(CHANNELS)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        layer(100 + torch.randn(4, CHANNELS, 3, generator=generator))
    return list(layer.state_dict().values())


def _trained_with_native_kernels_on_one_rank() -> list[Tensor]:
    return _trained("native" if dist.get_rank() == 0 else "reference")


def test_ranks_with_different_kernels_understand_each_other() -> None:
    mixed = run_world(2, _trained_with_native_kernels_on_one_rank)
    reference = run_world(2, _trained, "reference")
    # The sums are those of both; what each rank makes of them is rounded in its own way.
    for mine, other, expected in zip(*mixed, reference[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=0)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_of_another_dtype_are_tracked(dtype: torch.dtype) -> None:
    layer, truth = syncbn.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS).double()
    for buffer in (layer.running_mean, layer.running_var):
        assert buffer is not None
        buffer.data = buffer.data.to(dtype)
    x = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(0))
    layer(x)
    truth(x.double())
    for name in ("running_mean", "running_var"):
        mine, exact = getattr(layer, name), getattr(truth, name)
        assert mine.dtype == dtype
        assert_as_exact(mine, exact, exact.to(dtype), name)
