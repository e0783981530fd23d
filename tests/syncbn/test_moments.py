import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncbn.moments import Moments, checked_count, from_summable, merge, to_summable

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
        return Moments(count, torch.zeros(CHANNELS).double(), torch.zeros(CHANNELS).double())
    return Moments(count, x.mean(0), (x - x.mean(0)).square().sum(0))


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


@pytest.mark.parametrize("count", [-1.0, 2.0**40, math.nan])
def test_what_is_no_count_makes_all_moments_nan(count: float) -> None:
    vector = torch.ones(5, dtype=torch.float64)
    assert torch.equal(checked_count(vector), vector)
    vector[0] = count
    moments = from_summable(checked_count(vector), torch.zeros(2, dtype=torch.float64))
    assert moments.mean.isnan().all()
    assert moments.variance().isnan().all()
