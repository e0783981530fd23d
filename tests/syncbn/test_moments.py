import math
import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncbn import _native
from syncbn.moments import Moments, from_summable, merge, statistics_of, to_summable

CHANNELS = 3
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 7)
offsets = st.floats(-1e3, 1e3)


def _values(seed: int, size: int, offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, CHANNELS, dtype=torch.float64, generator=generator) + offset


def _moments(x: Tensor) -> Moments:
    count = torch.tensor(float(len(x)), dtype=torch.float64)
    if len(x) == 0:
        return Moments(torch.zeros(2 * CHANNELS + 1, dtype=torch.float64))
    return Moments.of(count, x.mean(0), (x - x.mean(0)).square().sum(0))


def _assert_same(actual: Moments, expected: Moments, offset: float) -> None:
    """Assert equality up to 16 roundings of terms as large as the samples, and their squares."""
    rounding = 16 * torch.finfo(torch.float64).eps
    magnitude = abs(offset) + 6  # no sample is six standard deviations away
    assert actual.count == expected.count
    assert ((actual.mean - expected.mean).abs() <= rounding * magnitude).all()
    assert ((actual.m2 - expected.m2).abs() <= rounding * expected.count * magnitude**2).all()


@given(seeds, sizes, sizes, offsets)
def test_merge_gives_the_moments_of_the_union(seed: int, n: int, m: int, offset: float) -> None:
    a, b = _values(seed, n, offset), _values(seed + 1, m, -offset)
    _assert_same(merge(_moments(a), _moments(b)), _moments(torch.cat([a, b])), offset)


@given(seeds, sizes, sizes, offsets)
def test_merge_is_order_free(seed: int, n: int, m: int, offset: float) -> None:
    a, b = _moments(_values(seed, n, offset)), _moments(_values(seed + 1, m, 1.0))
    _assert_same(merge(a, b), merge(b, a), max(offset, 1.0, key=abs))


@given(seeds, sizes, sizes, sizes, offsets)
def test_merge_is_associative(seed: int, n: int, m: int, k: int, offset: float) -> None:
    a, b, c = (_moments(_values(seed + i, size, offset)) for i, size in enumerate((n, m, k)))
    _assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), offset)


@given(seeds, sizes, offsets)
def test_merging_nothing_changes_nothing(seed: int, n: int, offset: float) -> None:
    a, nothing = _moments(_values(seed, n, offset)), _moments(torch.empty(0, CHANNELS))
    for merged in (merge(a, nothing), merge(nothing, a)):
        assert torch.equal(merged.mean, a.mean)
        assert torch.equal(merged.m2, a.m2)


@given(seeds, st.lists(sizes, min_size=1, max_size=4), offsets, st.none() | offsets)
def test_summed_vectors_hold_the_moments_of_the_union(
    seed: int, counts: list[int], offset: float, shift: float | None
) -> None:
    shares = [_values(seed + i, size, offset) for i, size in enumerate(counts)]
    shifts = None if shift is None else torch.full((CHANNELS,), shift, dtype=torch.float64)
    vectors = [to_summable(_moments(share), shifts) for share in shares]
    assert all(vector.shape == (2 * CHANNELS + 1,) for vector in vectors)
    total = from_summable(torch.stack(vectors).sum(0), shifts)
    _assert_same(total, _moments(torch.cat(shares)), abs(offset) + abs(shift or 0.0))


def test_a_shift_near_the_mean_keeps_the_variance_of_a_distant_batch() -> None:
    x = _values(0, 1000, 0.0) * 1e-2 + 1e4
    expected = _moments(x)
    error = {}
    for name, shift in (("cold", None), ("warm", torch.full((CHANNELS,), 1e4).double())):
        total = from_summable(to_summable(expected, shift), shift)
        error[name] = ((total.m2 - expected.m2) / expected.m2).abs().max().item()
    assert error["warm"] < 1e-12
    assert error["cold"] > error["warm"]


@given(seeds, st.integers(2, 9), offsets)
def test_variances_are_those_of_torch(seed: int, n: int, offset: float) -> None:
    x = _values(seed, n, offset)
    moments = _moments(x)
    torch.testing.assert_close(moments.variance(), x.var(0, correction=0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moments.unbiased_variance(), x.var(0), rtol=1e-9, atol=1e-12)


def test_moments_are_views_of_one_vector() -> None:
    count, mean, m2 = torch.tensor(7.0).double(), torch.arange(3.0).double(), torch.ones(3).double()
    moments = Moments.of(count, mean, m2)
    assert torch.equal(moments.packed, torch.tensor([7.0, 0, 1, 2, 1, 1, 1]).double())
    for view, expected in ((moments.count, count), (moments.mean, mean), (moments.m2, m2)):
        assert torch.equal(view, expected)
        assert view.untyped_storage().data_ptr() == moments.packed.untyped_storage().data_ptr()


@given(seeds, st.integers(1, 9), offsets, st.sampled_from([1e-5, 1e-12, 1.0]))
def test_statistics_are_count_means_and_inverse_deviations(
    seed: int, n: int, offset: float, eps: float
) -> None:
    x = _values(seed, n, offset)
    count, mean, invstd = statistics_of(_moments(x), eps).split([1, CHANNELS, CHANNELS])
    assert count == n
    assert torch.equal(mean, x.mean(0))
    expected = 1 / (x.var(0, correction=0) + eps).sqrt()
    torch.testing.assert_close(invstd, expected, rtol=1e-9, atol=0)


def test_statistics_of_nothing_are_finite() -> None:
    statistics = statistics_of(Moments(torch.zeros(2 * CHANNELS + 1).double()), 0.25)
    assert torch.equal(statistics, torch.tensor([0.0, 0, 0, 0, 2, 2, 2]).double())


# The native versions, which plain tensors on the CPU get, beside those in PyTorch operations.

NAN, INF = math.nan, math.inf
# Counts, means and M2 that batches have rarely, or that a sum leaves which went wrong.
ODD = {
    "nothing": [0.0, 0, 0, 0, 0, 0, 0],
    "one value": [1.0, 3, -4, 1e-300, 0, 0, 0],
    "no count": [NAN, 1, 2, 3, 1, 2, 3],
    "not finite": [5.0, NAN, INF, -INF, 1, NAN, INF],
    "a squared sum below 0": [4.0, 1, 2, 3, -1e-9, -5, 0],
}
SHIFTS = {"0": None, "a shift": [1.5, -2.5, 1e8], "a shift that is not finite": [NAN, INF, 0.0]}


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="elsewhere a compiler may fuse two operations into one, which rounds once",
)
@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("values", [*ODD.values(), None], ids=[*ODD, "a batch"])
def test_native_versions_are_the_pytorch_versions_bit_for_bit(
    values: list[float] | None, shift: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = _moments(_values(0, 7, 30.0)).packed
    if values is not None:
        packed = torch.tensor(values, dtype=torch.float64)
    about = None if shift is None else torch.tensor(shift, dtype=torch.float64)

    def compute() -> list[Tensor]:
        return [
            to_summable(Moments(packed), about),
            from_summable(packed, about).packed,
            statistics_of(Moments(packed), 1e-5),
            statistics_of(Moments(packed), 0.0),
        ]

    assert _native.library is not None
    native = compute()
    monkeypatch.setattr(_native, "library", None)
    for mine, expected in zip(native, compute(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_vmap_sees_operations_where_the_library_would_see_no_memory() -> None:
    packed = torch.stack([_moments(_values(seed, 5, 2.0)).packed for seed in range(2)])
    shift = torch.ones(CHANNELS).double()

    def there_and_back(packed: Tensor) -> Tensor:
        moments = from_summable(to_summable(Moments(packed), shift), shift)
        return statistics_of(moments, 1e-5)

    together = torch.vmap(there_and_back)(packed)
    torch.testing.assert_close(together, torch.stack([there_and_back(row) for row in packed]))
