"""What every set of kernels must do; truth is the formula in float64."""

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from syncbn.kernels.native import NativeKernels
from syncbn.kernels.protocol import Kernels, Masking, Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.mark import Mark, Marks
from syncbn.moments import Moments
from tests.support.native import limited
from tests.support.tolerance import assert_as_exact

SHAPES = [(5, 3), (1, 1), (4, 3, 7), (2, 5, 3, 4), (3, 2, 2, 3, 2), (11, 37, 5, 7), (3, 5, 300)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What a layer's buffers may be: it is a choice of whoever trains, and none of the input.
BUFFERS = [torch.float64, torch.float32, torch.bfloat16]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
buffers = pytest.mark.parametrize("dtype", BUFFERS, ids=str)
momenta = pytest.mark.parametrize("momentum", [0.3, None, 0.0, 1.0])


@pytest.fixture(
    params=[None, 0, 1, 2, 512],
    ids=["reference", *(f"native at level {n}" for n in range(3)), "triton"],
)
def kernels(request: pytest.FixtureRequest) -> Generator[Kernels]:
    """The reference, the native kernels at each level of instructions, Triton's, interpreted."""
    if request.param is None:
        yield ReferenceKernels()
    elif request.param <= 2:
        with limited(request.param):
            yield NativeKernels()
    else:
        from tests.support.interpreted import tiles_of  # interprets in all of the process

        with tiles_of(request.param) as kernels:
            yield kernels


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) + offset).to(dtype)


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _column(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def _norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, relu: bool = False
) -> Normalization:
    """Return the normalization by the statistics of x itself."""
    exact, axes = x.double(), _axes(x)
    invstd = torch.rsqrt(exact.var(axes, correction=0) + 1e-5)
    count = exact.new_full((1,), x.numel() / x.shape[1])
    return Normalization(torch.cat([count, exact.mean(axes), invstd]), weight, bias, relu)


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
    assert moments.packed.shape == (2 * shape[1] + 1,)
    assert moments.packed.dtype == torch.float64
    assert moments.count == x.numel() / shape[1]
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
    zeros = torch.zeros(6).double()
    norm = Normalization(torch.tensor([0.0, 0, 0, 0, 1, 1, 1]).double())
    assert torch.equal(kernels.local_moments(x).packed, torch.zeros(7).double())
    assert torch.equal(kernels.backward_reduce(x, x, norm), zeros)
    assert kernels.normalize(x, norm).shape == x.shape
    assert kernels.backward_input(x, x, norm, zeros).shape == x.shape


@shapes
@dtypes
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("fused", ["", "residual", "relu", "residual and relu"])
def test_normalize_is_the_formula(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, affine: bool, fused: str
) -> None:
    x = _random(shape, dtype, 0, 3.0)
    weight, bias = (_random(shape[1:2], torch.float32, seed) for seed in (1, 2))
    residual = _random(shape, dtype, 3) if "residual" in fused else None
    norm = _norm(x, *((weight, bias) if affine else (None, None)), "relu" in fused)
    y = kernels.normalize(x, norm, residual)

    def formula(x: Tensor, precision: torch.dtype) -> Tensor:
        vectors = (norm.mean, norm.invstd, weight, bias)
        columns = (_column(vector.to(precision), x) for vector in vectors)
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
    weight = _random(shape[1:2], torch.float32, 2) if affine else None
    bias = _random(shape[1:2], torch.float32, 3) if affine else None
    norm = _norm(x, weight, bias, relu)
    axes, count = _axes(x), x.numel() / shape[1]

    def formula(precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        factor = norm.invstd.to(precision)
        xhat = (x.to(precision) - _column(norm.mean.to(precision), x)) * _column(factor, x)
        dy_ = dy.to(precision)
        scale = factor if weight is None else factor * weight.to(precision)
        if relu:
            y = (x.double() - _column(norm.mean, x)) * _column(norm.invstd, x)
            if weight is not None and bias is not None:
                y = y * _column(weight.double(), x) + _column(bias.double(), x)
            dy_ = dy_ * (y > 0)
        sum_dy, sum_dy_xhat = dy_.sum(axes), (dy_ * xhat).sum(axes)
        inner = dy_ - _column(sum_dy / count, x) - xhat * _column(sum_dy_xhat / count, x)
        return sum_dy, sum_dy_xhat, inner * _column(scale, x)

    sums = kernels.backward_reduce(dy, x, norm)
    dx = kernels.backward_input(dy, x, norm, sums)
    truth, plain = formula(torch.float64), formula(torch.promote_types(dtype, torch.float32))
    assert sums.shape == (2 * shape[1],)
    assert sums.dtype == torch.float64
    assert dx.dtype == dtype
    sum_dy, sum_dy_xhat = sums.chunk(2)
    assert_as_exact(sum_dy.to(plain[0].dtype), truth[0], plain[0], "Σdy")
    assert_as_exact(sum_dy_xhat.to(plain[1].dtype), truth[1], plain[1], "Σdy·x̂")
    scale = norm.invstd if weight is None else norm.invstd * weight
    terms = (scale.abs().max() * dy.double().abs().max()).item()
    assert_as_exact(dx, truth[2], plain[2].to(dtype), "dx", terms)


@dtypes
def test_sums_are_divided_by_the_count_of_the_whole_batch(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    x, dy = _random((4, 3, 5), dtype, 0), _random((4, 3, 5), dtype, 1)
    norm = _norm(x)
    sums = kernels.backward_reduce(dy, x, norm)
    # A batch four times as large, of powers of two, so that no rounding differs.
    statistics = norm.statistics.clone()
    statistics[0] *= 4
    larger = norm._replace(statistics=statistics)
    dx = kernels.backward_input(dy, x, norm, sums)
    assert torch.equal(kernels.backward_input(dy, x, larger, 4 * sums), dx)
    # Of a count of 0 there is nothing to divide by: as for 1.
    none, single = (
        norm._replace(statistics=torch.cat([norm.statistics.new_tensor([count]), statistics[1:]]))
        for count in (0.0, 1.0)
    )
    assert torch.equal(
        kernels.backward_input(dy, x, none, sums), kernels.backward_input(dy, x, single, sums)
    )


def test_nan_passes_the_relu_and_its_gradient(kernels: Kernels) -> None:
    x = torch.tensor([-1.0, 1.0, torch.nan, torch.nan] * 5).reshape(2, 1, 10)
    norm = Normalization(torch.tensor([20.0, 0, 1]).double(), relu=True)
    y = kernels.normalize(x, norm)
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0, equal_nan=True)
    dx = kernels.backward_input(torch.ones(1).expand_as(x), x, norm, torch.zeros(2).double())
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
    norm = _norm(x)
    sums = norm.statistics[1:] * norm.total
    y, dx = kernels.normalize(x, norm), kernels.backward_input(dy, x, norm, sums)
    torch.testing.assert_close(y, kernels.normalize(dense, norm))
    torch.testing.assert_close(dx, kernels.backward_input(dy, dense, norm, sums))
    torch.testing.assert_close(kernels.local_moments(x).m2, kernels.local_moments(dense).m2)
    reduced = (kernels.backward_reduce(dy, of, norm) for of in (x, dense))
    # Of 40 products, each the result of at most four roundings in float32, and of about 1.
    torch.testing.assert_close(*reduced, rtol=0, atol=40 * 4 * 2.0**-24)
    for output in (y, dx):
        assert output.stride() == torch.empty_like(x).stride()


def test_inputs_are_left_as_they_are(kernels: Kernels) -> None:
    x, dy = _random((4, 3, 5), torch.float32, 0), _random((4, 3, 5), torch.float32, 1)
    norm, sums = _norm(x), _random((6,), torch.float64, 2)
    given = (x, dy, norm.statistics, sums)
    before = [tensor.clone() for tensor in given]
    kernels.local_moments(x)
    kernels.normalize(x, norm)
    kernels.backward_reduce(dy, x, norm)
    kernels.backward_input(dy, x, norm, sums)
    for tensor, expected in zip(given, before, strict=True):
        assert torch.equal(tensor, expected)


# What ranks tell each other.


def _rows(kernels: Kernels, sizes: tuple[int, ...], shift: Tensor | None) -> Tensor:
    parts = _random((sum(sizes), 3, 4), torch.float32, 0, 5.0).split(sizes)
    return torch.stack([kernels.row(part, shift) for part in parts])


@pytest.mark.parametrize("sizes", [(4, 4), (1, 5), (0, 6), (6, 0, 2), (1,) * 9])
def test_rows_of_all_ranks_merge_to_the_moments_of_the_whole_batch(
    kernels: Kernels, sizes: tuple[int, ...]
) -> None:
    shift = _random((3,), torch.float64, 1)
    rows = _rows(kernels, sizes, shift)
    assert rows.shape == (len(sizes), 8)
    moments = kernels.merge(rows, shift)
    exact = _random((sum(sizes), 3, 4), torch.float32, 0, 5.0).double()
    assert moments.count == sum(sizes) * 4
    torch.testing.assert_close(moments.mean, exact.mean((0, 2)), rtol=0, atol=2**-23)
    m2 = (exact - exact.mean((0, 2), keepdim=True)).square().sum((0, 2))
    torch.testing.assert_close(moments.m2, m2, rtol=1e-6, atol=0)
    assert torch.equal(shift, moments.mean)


def test_batches_far_from_each_other_merge_exactly(kernels: Kernels) -> None:
    means = torch.tensor([1e8, -1e8, 3e8]).double()
    rows = torch.tensor([[2.0, mean, 1.0, 0.0] for mean in means.tolist()]).double()
    expected = 3 + 2 * (means - means.mean()).square().sum()
    torch.testing.assert_close(kernels.merge(rows, None).m2[0], expected, rtol=1e-15, atol=0)


def test_stamp_is_the_same_whoever_makes_it(kernels: Kernels) -> None:
    x, shift = _random((2, 150), torch.float32, 0), _random((150,), torch.float64, 1)
    stamp = kernels.row(x, shift)[-1]
    assert stamp == ReferenceKernels().row(x, shift)[-1]
    assert 0 < stamp < 2**52
    assert kernels.row(x, None)[-1] == kernels.row(x, torch.zeros_like(shift))[-1] == 0
    for change in (shift.flip(0), -shift, shift * (1 + 2**-50)):
        assert kernels.row(x, change)[-1] != stamp


def test_other_stamps_make_the_moments_nan_and_0_goes_with_all(kernels: Kernels) -> None:
    shift = _random((3,), torch.float64, 1)
    rows, before = _rows(kernels, (2, 2, 2), shift), shift.clone()
    rows[1, -1] += 1
    moments = kernels.merge(rows, shift)
    assert moments.count.isnan()
    assert moments.mean.isnan().all()
    assert torch.equal(shift, before)
    rows[1, -1] = torch.nan  # of a rank that refuses its input
    assert kernels.merge(rows, shift).count.isnan()
    rows[1, -1] = 0
    assert kernels.merge(rows, shift).count == 24


def test_empty_ranks_leave_the_shift_alone(kernels: Kernels) -> None:
    shift = _random((3,), torch.float64, 1)
    before = shift.clone()
    moments = kernels.merge(_rows(kernels, (0, 0), shift), shift)
    assert torch.equal(moments.packed, torch.zeros(7).double())
    assert torch.equal(shift, before)


@pytest.mark.parametrize("eps", [1e-5 / 3, 1e-44, 1e-76])
def test_statistics_are_count_means_and_inverse_deviations(kernels: Kernels, eps: float) -> None:
    for count in (0.0, 1.0, 7.0):
        moments = _batch(count)
        statistics = kernels.normalization(moments, None, None, False, eps).statistics
        invstd = torch.rsqrt(moments.m2 / max(count, 1) + eps)
        assert torch.equal(statistics[:6], moments.packed[:6])
        torch.testing.assert_close(statistics[6:], invstd, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_steps(kernels: Kernels, dtype: torch.dtype) -> None:
    x, dy = _random((4, 3, 5), torch.float32, 0), _random((4, 3, 5), torch.float32, 1)
    norm = _norm(x, _random((3,), dtype, 2), _random((3,), dtype, 3), relu=True)
    written = dtype in kernels.parameter_dtypes
    dweight, dbias = (torch.full((3,), torch.nan, dtype=dtype) if written else None for _ in "ab")
    sums, dx = kernels.gradients(dy, x, norm, dweight, dbias, lambda sums: 2 * sums)
    expected = kernels.backward_reduce(dy, x, norm)
    assert torch.equal(sums, expected)
    assert dx is not None
    assert torch.equal(dx, kernels.backward_input(dy, x, norm, 2 * expected))
    if dweight is not None and dbias is not None:
        assert torch.equal(dbias, expected[:3].to(dtype))
        assert torch.equal(dweight, expected[3:].to(dtype))
    assert kernels.gradients(dy, x, norm, dweight, dbias, None)[1] is None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_masked_by_an_output(
    kernels: Kernels, dtype: torch.dtype, channels_last: bool
) -> None:
    if not kernels.masks:
        pytest.skip("masked by an operation of its own")
    x, dy, output = (_random((4, 3, 5, 2), dtype, seed) for seed in range(3))
    output[0, 0, 0] = torch.tensor([0.0, torch.nan])  # NaN is not less than anything
    if channels_last:
        x, output = (t.contiguous(memory_format=torch.channels_last) for t in (x, output))
    expected = torch.ops.aten.threshold_backward(dy, output, 0)
    norm = _norm(x)
    by_hand = kernels.gradients(expected, x, norm, None, None, lambda sums: sums)
    masked = torch.full_like(x, torch.nan)
    masking = Masking(output, masked)
    results = kernels.gradients(dy, x, norm, None, None, lambda sums: sums, None, masking)
    assert torch.equal(masked, expected)
    for result, other in zip(results, by_hand, strict=True):
        assert result is not None
        assert other is not None
        assert torch.equal(result, other)


def test_marks_are_left_before_and_after_an_exchange(kernels: Kernels) -> None:
    x, slot = _random((4, 3, 5), torch.float32, 0), torch.zeros(1, dtype=torch.int64)
    if isinstance(kernels, NativeKernels):
        pytest.skip("on the CPU, nobody looks for marks")
    rows = kernels.row(x, None, Mark(slot, 2)).unsqueeze(0)
    assert slot == 2
    kernels.merge(rows, None, Mark(slot, 3))
    assert slot == 3

    def add_up(sums: Tensor) -> Tensor:
        assert slot == 4
        return sums

    kernels.gradients(x, x, _norm(x), None, None, add_up, Marks(Mark(slot, 4), Mark(slot, 5)))
    assert slot == 5


# Running statistics.


def _running(dtype: torch.dtype, strided: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return running statistics of five channels after three batches."""
    mean, var = _random((10,), dtype, 0), _random((10,), dtype, 1).abs()
    tracked = torch.tensor(3)
    return (mean[::2], var[::2], tracked) if strided else (mean[:5], var[:5], tracked)


def _batch(count: float, seed: int = 2) -> Moments:
    mean, m2 = _random((5,), torch.float64, seed), _random((5,), torch.float64, seed + 1).abs()
    return Moments.of(torch.tensor(count).double(), mean, count * m2)


def _assert_moved(
    running: Tensor, before: Tensor, batch: Tensor, share: float, dtype: torch.dtype
) -> None:
    """Assert (1 − share)·before + share·batch, computed in float64 and rounded to the dtype."""
    old, new = before.double() * (1 - share), batch * share
    expected = old + new
    # Half a unit for the last rounding; torch rounds to bfloat16 by way of float32.
    last = torch.finfo(dtype).eps / 2 + (2.0**-24 if dtype == torch.bfloat16 else 0)
    rounding = last * expected.abs() + 3 * 2.0**-52 * (old.abs() + new.abs())
    assert running.dtype == dtype
    assert ((running.double() - expected).abs() <= rounding).all()


@buffers
@momenta
@pytest.mark.parametrize("strided", [False, True])
def test_running_statistics_move_by_the_formula(
    kernels: Kernels, dtype: torch.dtype, momentum: float | None, strided: bool
) -> None:
    mean, var, tracked = _running(dtype, strided)
    for step, count in enumerate((7.0, 2.0, 100352.0), 4):
        before, moments = (mean.clone(), var.clone()), _batch(count, seed=step)
        kernels.update_running(moments, mean, var, tracked, momentum)
        assert tracked == step
        share = 1 / step if momentum is None else momentum
        _assert_moved(mean, before[0], moments.mean, share, dtype)
        _assert_moved(var, before[1], moments.m2 / (count - 1), share, dtype)
    if momentum == 0:
        for running, start in zip((mean, var), _running(dtype, strided), strict=False):
            assert torch.equal(running, start)


def test_a_plain_average_is_that_of_all_batches(kernels: Kernels) -> None:
    mean, var, tracked = torch.full((5,), torch.pi), torch.full((5,), torch.e), torch.tensor(0)
    batches = [_batch(count, seed=int(count)) for count in (2.0, 9.0, 30.0)]
    for moments in batches:
        kernels.update_running(moments, mean, var, tracked, None)
    of_means = torch.stack([moments.mean for moments in batches]).mean(0)
    of_variances = torch.stack([moments.unbiased_variance() for moments in batches]).mean(0)
    # Rounded to float32 after each of three batches; the values are below 4.
    torch.testing.assert_close(mean.double(), of_means, rtol=0, atol=3 * 4 * 2.0**-24)
    torch.testing.assert_close(var.double(), of_variances, rtol=0, atol=3 * 4 * 2.0**-24)


@buffers
@momenta
@pytest.mark.parametrize("strided", [False, True])
def test_empty_batch_moves_no_running_statistics(
    kernels: Kernels, dtype: torch.dtype, momentum: float | None, strided: bool
) -> None:
    running, before = _running(dtype, strided), _running(dtype, strided)
    running[0][1] = before[0][1] = torch.inf
    kernels.update_running(Moments(torch.zeros(11).double()), *running, momentum)
    for tensor, expected in zip(running, before, strict=True):
        assert torch.equal(tensor, expected)


@buffers
def test_one_value_has_an_unbiased_variance_of_0(kernels: Kernels, dtype: torch.dtype) -> None:
    mean, var, tracked = _running(dtype)
    moments = Moments.of(torch.ones(()).double(), _batch(1.0).mean, torch.zeros(5).double())
    kernels.update_running(moments, mean, var, tracked, 1.0)
    assert torch.equal(mean, moments.mean.to(dtype))
    assert torch.equal(var, torch.zeros(5, dtype=dtype))
    assert tracked == 4


@buffers
@pytest.mark.parametrize("strided", [False, True])
def test_running_statistics_count_as_changed(
    kernels: Kernels, dtype: torch.dtype, strided: bool
) -> None:
    running = _running(dtype, strided)
    before = [tensor._version for tensor in running]
    kernels.update_running(_batch(7.0), *running, 0.1)
    assert all(tensor._version > version for tensor, version in zip(running, before, strict=True))


def test_what_lies_between_strided_running_statistics_is_left_alone(kernels: Kernels) -> None:
    whole = torch.arange(10.0)
    kernels.update_running(_batch(7.0), whole[::2], torch.ones(5), torch.tensor(0), 0.5)
    assert torch.equal(whole[1::2], torch.arange(10.0)[1::2])


def test_running_statistics_of_two_dtypes_are_moved(kernels: Kernels) -> None:
    mean, var, tracked = torch.zeros(5), torch.ones(5).double(), torch.tensor(0)
    moments = _batch(7.0)
    kernels.update_running(moments, mean, var, tracked, 1.0)
    assert torch.equal(mean, moments.mean.float())
    assert torch.equal(var, moments.unbiased_variance())


@pytest.mark.parametrize("sizes", [(4, 5), (5, 4), (6, 5), (5, 6), (4, 4), (6, 6)])
def test_running_statistics_of_another_size_are_refused(
    kernels: Kernels, sizes: tuple[int, int]
) -> None:
    mean, var = (torch.zeros(size) for size in sizes)
    with pytest.raises(RuntimeError, match="size"):
        kernels.update_running(_batch(7.0), mean, var, torch.tensor(0), 0.1)


def test_running_statistics_of_another_shape_are_refused(kernels: Kernels) -> None:
    column = torch.zeros(5, 1)
    for mean, var in ((column, torch.zeros(5)), (torch.zeros(5), column)):
        with pytest.raises(RuntimeError, match="shape"):
            kernels.update_running(_batch(7.0), mean, var, torch.tensor(0), 0.1)


def test_moments_are_left_as_they_are(kernels: Kernels) -> None:
    moments = _batch(7.0)
    before = moments.packed.clone()
    kernels.update_running(moments, *_running(torch.float32), 0.1)
    assert torch.equal(moments.packed, before)


def test_running_statistics_carry_no_gradient(kernels: Kernels) -> None:
    running = _running(torch.float32)
    moments = Moments(_batch(7.0).packed.requires_grad_())
    kernels.update_running(moments, *running, 0.1)
    assert not any(tensor.requires_grad for tensor in running)
