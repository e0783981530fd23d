"""Per-channel moments (count, mean, M2): how to merge them, and how to add them up over ranks."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from syncbn import _native
from syncbn._native.plain import are_plain, is_unobserved

# How many of the leading means a stamp is made of.
STAMPED = 128


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


def stamp_of(shift: Tensor) -> Tensor:
    """Return a whole number below 2⁵² that tells layers apart by the means of their latest batches.

    A hash of the bits of the leading 128 means, in which neither the order of channels nor signs go
    unnoticed; 0 if all are 0, as before the first batch.

    Args:
        shift: the means, shape (C,), float64.

    Returns:
        Shape (1,), float64.
    """
    mixed = mixed_bits(shift.detach()[:STAMPED].contiguous())
    return ((mixed >> 12) & (2**52 - 1)).double().reshape(1)


def mixed_bits(vector: Tensor) -> Tensor:
    """Return a hash of a vector's bits, 0-d, int64, whose leading bits depend on all of them.

    Any changed bit changes its word, and the sum of words modulo 2⁶⁴; an odd factor for each
    channel, and the leading half of a word upon the other, so that neither the order of channels
    nor an even number of signs goes unnoticed. The multiplier, 2⁶⁴ divided by the golden ratio,
    spreads the change into the leading bits.

    Args:
        vector: shape (C,), float64, contiguous.
    """
    words = vector.view(torch.int64)
    odd = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=vector.device)
    return ((words ^ (words >> 32)) * odd).sum() * -7046029254386353131


def to_row(moments: Moments, shift: Tensor | None = None) -> Tensor:
    """Return what one rank tells the others: its moments, and a stamp made of the shift.

    Args:
        moments: of this rank's batch.
        shift: the means of the layer's latest batch, which are the same on every rank; None for no
            stamp, i.e. 0.

    Returns:
        Shape (2C + 2,), float64: 16C + 16 bytes.
    """
    packed = moments.packed
    return torch.cat([packed, packed.new_zeros(1) if shift is None else stamp_of(shift)])


def from_rows(rows: Tensor, shift: Tensor | None = None) -> Moments:
    """Return the moments of the union of all ranks' batches, from their rows in order of rank.

    With n and m the counts and means of the batches, mean = Σn·m/Σn and M2 = ΣM2 + Σn·(m − mean)².
    Count and means are NaN if ranks have different stamps, because they called different layers; a
    stamp of 0 goes with every other.

    Args:
        rows: those of `to_row` of every rank, shape (W, 2C + 2).
        shift: set to the means, in place, if they are finite and there are samples; None for
            nothing to set.

    Source: Chan, Golub and LeVeque (1979), the equations that 2.1 is made of.
    """
    rows, stamps = rows.detach().split([rows.shape[1] - 1, 1], 1)
    channels = rows.shape[1] // 2
    counts, means, m2 = rows.split([1, channels, channels], 1)
    alike = ((stamps == 0) | (stamps == stamps.amax())).all()
    empty = counts == 0
    count = counts.sum()
    # An empty batch must not drag the mean towards its placeholder 0.
    offsets = (counts * (means - means[0])).masked_fill(empty, 0)
    mean = means[0] + offsets.sum(0) / count.clamp(min=1)
    squares = (m2 + counts * (means - mean).square()).masked_fill(empty, 0)
    count, mean = (torch.where(alike, result, torch.nan) for result in (count, mean))
    if shift is not None:
        move_shift(shift, count, mean)
    return Moments.of(count, mean, squares.sum(0))


def move_shift(shift: Tensor, count: Tensor, mean: Tensor) -> None:
    """Set a shift to the means of a batch, in place, where they are finite and it has samples."""
    shift.copy_(torch.where((count > 0) & mean.isfinite(), mean, shift))


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
