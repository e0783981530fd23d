"""Per-channel moments (count, mean, M2): how to merge them, and how to add them up over ranks."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from syncbn import _native
from syncbn._native.plain import are_plain, is_unobserved


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and M2 = Σ(x − mean)² of every channel of a batch, as one vector.

    A batch without samples has count 0, means 0 and M2 0.

    Attributes:
        packed: count, C means and C times M2, shape (2C + 1,), float64; the mean in the unit of x,
            M2 in its square. Half precision would turn a count of 100352 into inf.
    """

    packed: Tensor

    @classmethod
    def of(cls, count: Tensor, mean: Tensor, m2: Tensor) -> Self:
        """Return the moments of these values: count 0-d, mean and M2 of shape (C,), float64."""
        return cls(torch.cat([count.reshape(1), mean, m2]))

    @property
    def count(self) -> Tensor:
        """Values per channel, 0-d: a view."""
        return self.packed[0]

    @property
    def mean(self) -> Tensor:
        """Means, shape (C,): a view."""
        return self.packed[1 : (self.packed.shape[0] + 1) // 2]

    @property
    def m2(self) -> Tensor:
        """M2, shape (C,), never negative: a view."""
        return self.packed[(self.packed.shape[0] + 1) // 2 :]

    def variance(self) -> Tensor:
        """Return the biased variance M2 / count, shape (C,), float64; 0 without samples."""
        return self.m2 / self.count.clamp(min=1)

    def unbiased_variance(self) -> Tensor:
        """Return M2 / (count − 1), shape (C,), float64; 0 below two samples."""
        return self.m2 / (self.count - 1).clamp(min=1)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two batches.

    mean = mean_a + δ·n_b/n and M2 = M2_a + M2_b + δ²·n_a·n_b/n, with δ = mean_b − mean_a and
    n = n_a + n_b. No communication. Relative error of M2: a few float64 roundings.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979), equation 2.1.
    """
    count = a.count + b.count
    share = b.count / count.clamp(min=1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    # An empty side must not drag the mean towards its placeholder 0.
    mean = torch.where(a.count == 0, b.mean, torch.where(b.count == 0, a.mean, mean))
    return Moments.of(count, mean, a.m2 + b.m2 + delta.square() * a.count * share)


def to_summable(moments: Moments, shift: Tensor | None = None) -> Tensor:
    """Return a vector that, summed over ranks, holds the moments of the whole batch.

    The layout is [count, count·(mean − K), M2 + count·(mean − K)²].

    Args:
        moments: one rank's moments of C channels.
        shift: K, shape (C,), float64, identical on every rank; None means 0. The closer K is to
            the mean, the less the sum cancels: σ² loses about 2·log₂(|mean − K|/σ) of its 53 bits.

    Returns:
        Shape (2C + 1,), float64: 16C + 8 bytes.
    """
    packed = moments.packed
    library = _native.library
    if library is not None and is_unobserved() and are_plain(packed, shift):
        vector, channels = torch.empty_like(packed), packed.shape[0] // 2
        about = None if shift is None else shift.data_ptr()
        library.syncbn_pack_moments(packed.data_ptr(), channels, about, vector.data_ptr())
        return vector
    offset = moments.mean if shift is None else moments.mean - shift
    first = moments.count * offset
    return torch.cat([moments.count.reshape(1), first, moments.m2 + first * offset])


def from_summable(vector: Tensor, shift: Tensor | None = None) -> Moments:
    """Return the moments held by a vector of `to_summable`, or by a sum of such vectors.

    With d = Σ₁/total: mean = K + d and M2 = max(Σ₂ − total·d², 0).

    Args:
        vector: shape (2C + 1,), float64.
        shift: the K that every summand was made with.
    """
    channels = vector.shape[0] // 2
    library = _native.library
    if library is not None and is_unobserved() and are_plain(vector, shift):
        packed = torch.empty_like(vector)
        about = None if shift is None else shift.data_ptr()
        library.syncbn_unpack_moments(vector.data_ptr(), channels, about, packed.data_ptr())
        return Moments(packed)
    count, first, second = vector[0], vector[1 : channels + 1], vector[channels + 1 :]
    offset = first / count.clamp(min=1)
    m2 = (second - first * offset).clamp(min=0)
    mean = offset if shift is None else torch.where(count > 0, offset + shift, offset)
    return Moments.of(count, mean, m2)


def statistics_of(moments: Moments, eps: float) -> Tensor:
    """Return what normalizes a batch: count, means, and 1/√(σ² + eps) with the biased σ².

    Args:
        moments: of the batch.
        eps: dimension of the variance.

    Returns:
        Shape (2C + 1,), float64.
    """
    packed = moments.packed
    library = _native.library
    if library is not None and is_unobserved() and are_plain(packed):
        statistics, channels = torch.empty_like(packed), packed.shape[0] // 2
        library.syncbn_statistics(packed.data_ptr(), channels, eps, statistics.data_ptr())
        return statistics
    invstd = torch.rsqrt(moments.variance() + eps)
    return torch.cat([packed[: packed.shape[0] - invstd.shape[0]], invstd])
