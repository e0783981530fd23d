"""What every set of kernels must do; truth is the formula in float64."""

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from syncbn.kernels.protocol import Kernels, NativeKernels, ReferenceKernels
from tests.support.native import limited
from tests.support.tolerance import assert_as_exact

SHAPES = [(5, 3), (1, 1), (4, 3, 7), (2, 5, 3, 4), (3, 2, 2, 3, 2), (11, 37, 5, 7), (3, 5, 300)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(
    params=[None, 0, 1, 2], ids=["reference", *(f"native at level {n}" for n in range(3))]
)
def kernels(request: pytest.FixtureRequest) -> Generator[Kernels]:
    """The reference, and the native kernels at each level of instructions."""
    if request.param is None:
        yield ReferenceKernels()
        return
    with limited(request.param):
        yield NativeKernels()


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) + offset).to(dtype)


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _column(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    exact = x.double()
    return exact.mean(_axes(x)), torch.rsqrt(exact.var(_axes(x), correction=0) + 1e-5)


@shapes
@dtypes
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_local_moments_are_those_in_float64(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, offset: float
) -> None:
    x = _random(shape, dtype, 0, offset)
    moments = kernels.local_moments(x)
    exact, axes = x.double(), _axes(x)
    m2 = (exact - exact.mean(axes, keepdim=True)).square().sum(axes)
    assert moments.count == x.numel() / shape[1]
    assert moments.mean.dtype == moments.m2.dtype == moments.count.dtype == torch.float64
    # The mean in more than float32: its error scales with the deviations and not with the offset.
    farthest = (exact - exact.mean(axes, keepdim=True)).abs().max().item()
    torch.testing.assert_close(moments.mean, exact.mean(axes), rtol=1e-15, atol=2**-23 * farthest)
    torch.testing.assert_close(moments.m2, m2, rtol=1e-6, atol=1e-12)


def test_variance_of_a_distant_float32_batch_keeps_its_digits(kernels: Kernels) -> None:
    x = (_random((64, 4, 9), torch.float64, 0) * 1e-2 + 1e4).float()
    m2 = kernels.local_moments(x).m2
    exact = x.double()
    expected = (exact - exact.mean((0, 2), keepdim=True)).square().sum((0, 2))
    torch.testing.assert_close(m2, expected, rtol=1e-6, atol=0)


@dtypes
def test_empty_batch_has_zero_moments_and_sums(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.empty(0, 3, 4, dtype=dtype)
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    moments = kernels.local_moments(x)
    assert moments.count == 0
    for tensor in (moments.mean, moments.m2, *kernels.backward_reduce(x, x, zero, one)):
        assert torch.equal(tensor, zero)
    assert kernels.normalize(x, zero, one, None, None).shape == x.shape
    assert kernels.backward_input(x, x, zero, one, None, zero, zero).shape == x.shape


@shapes
@dtypes
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("fused", ["", "residual", "relu", "residual and relu"])
def test_normalize_is_the_formula(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, affine: bool, fused: str
) -> None:
    x = _random(shape, dtype, 0, 3.0)
    mean, invstd = _statistics(x)
    weight, bias = (_random(shape[1:2], torch.float32, seed) for seed in (1, 2))
    residual = _random(shape, dtype, 3) if "residual" in fused else None
    parameters = (weight, bias) if affine else (None, None)
    y = kernels.normalize(x, mean, invstd, *parameters, residual, "relu" in fused)

    def formula(x: Tensor, precision: torch.dtype) -> Tensor:
        columns = (_column(vector.to(precision), x) for vector in (mean, invstd, weight, bias))
        head, factor, gamma, beta = columns
        result = (x.to(precision) - head) * factor
        if affine:
            result = result * gamma + beta
        if residual is not None:
            result = result + residual.to(precision)
        return result.relu() if "relu" in fused else result

    plain = formula(x, torch.promote_types(dtype, torch.float32)).to(dtype)
    assert y.dtype == dtype
    terms = formula(x.abs(), torch.float64).abs().max().item() + 1
    assert_as_exact(
        y, formula(x, torch.float64), plain, "y", terms if residual is not None else None
    )


@shapes
@dtypes
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [False, True])
def test_backward_is_the_formula(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, affine: bool, relu: bool
) -> None:
    x, dy = _random(shape, dtype, 0, 3.0), _random(shape, dtype, 1)
    mean, invstd = _statistics(x)
    weight = _random(shape[1:2], torch.float32, 2) if affine else None
    bias = _random(shape[1:2], torch.float32, 3) if affine else None
    axes, count = _axes(x), x.numel() / shape[1]

    def formula(precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        factor = invstd.to(precision)
        xhat = (x.to(precision) - _column(mean.to(precision), x)) * _column(factor, x)
        dy_ = dy.to(precision)
        scale = factor if weight is None else factor * weight.to(precision)
        if relu:
            y = (x.double() - _column(mean, x)) * _column(invstd, x)
            if weight is not None and bias is not None:
                y = y * _column(weight.double(), x) + _column(bias.double(), x)
            dy_ = dy_ * (y > 0)
        sum_dy, sum_dy_xhat = dy_.sum(axes), (dy_ * xhat).sum(axes)
        inner = dy_ - _column(sum_dy / count, x) - xhat * _column(sum_dy_xhat / count, x)
        return sum_dy, sum_dy_xhat, inner * _column(scale, x)

    gate = weight, bias, relu
    sum_dy, sum_dy_xhat = kernels.backward_reduce(dy, x, mean, invstd, *gate)
    means = sum_dy / count, sum_dy_xhat / count
    dx = kernels.backward_input(dy, x, mean, invstd, weight, *means, bias, relu)
    truth, plain = formula(torch.float64), formula(torch.promote_types(dtype, torch.float32))
    assert sum_dy.dtype == sum_dy_xhat.dtype == torch.float64
    assert dx.dtype == dtype
    assert_as_exact(sum_dy.to(plain[0].dtype), truth[0], plain[0], "Σdy")
    assert_as_exact(sum_dy_xhat.to(plain[1].dtype), truth[1], plain[1], "Σdy·x̂")
    scale = invstd if weight is None else invstd * weight
    terms = (scale.abs().max() * dy.double().abs().max()).item()
    assert_as_exact(dx, truth[2], plain[2].to(dtype), "dx", terms)


def test_nan_passes_the_relu_and_its_gradient(kernels: Kernels) -> None:
    x = torch.tensor([-1.0, 1.0, torch.nan, torch.nan] * 5).reshape(2, 1, 10)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    y = kernels.normalize(x, zero, one, None, None, None, True)
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0, equal_nan=True)
    dx = kernels.backward_input(
        one.float().expand_as(x), x, zero, one, None, zero, zero, None, True
    )
    assert torch.equal(dx.isnan(), x.isnan())  # x̂ is NaN there
    assert torch.equal(dx[x < 0], torch.zeros_like(dx[x < 0]))
    assert torch.equal(dx[x > 0], torch.ones_like(dx[x > 0]))


def _strided(layout: str) -> Tensor:
    x = _random((2, 6, 4, 5), torch.float32, 0)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3)
    if layout == "sliced":
        return _random((2, 6, 4, 10), torch.float32, 0)[..., ::2]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_memory_format_changes_no_value_and_is_kept(kernels: Kernels, layout: str) -> None:
    x = _strided(layout)
    dense = x.clone(memory_format=torch.contiguous_format)
    dy = _random(tuple(x.shape), torch.float32, 1)
    mean, invstd = _statistics(x)
    y = kernels.normalize(x, mean, invstd, None, None)
    dx = kernels.backward_input(dy, x, mean, invstd, None, mean, invstd)
    torch.testing.assert_close(y, kernels.normalize(dense, mean, invstd, None, None))
    torch.testing.assert_close(
        dx, kernels.backward_input(dy, dense, mean, invstd, None, mean, invstd)
    )
    torch.testing.assert_close(kernels.local_moments(x).m2, kernels.local_moments(dense).m2)
    for output in (y, dx):
        assert output.stride() == torch.empty_like(x).stride()


def test_inputs_are_left_as_they_are(kernels: Kernels) -> None:
    x, dy = _random((4, 3, 5), torch.float32, 0), _random((4, 3, 5), torch.float32, 1)
    x_before, dy_before = x.clone(), dy.clone()
    mean, invstd = _statistics(x)
    kernels.local_moments(x)
    kernels.normalize(x, mean, invstd, None, None)
    kernels.backward_reduce(dy, x, mean, invstd)
    kernels.backward_input(dy, x, mean, invstd, None, mean, invstd)
    assert torch.equal(x, x_before)
    assert torch.equal(dy, dy_before)
