"""Per-channel moments (count, mean, M2): how to merge them, and how to add them up over ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Totals fit in 40 of float64's 53 bits of whole numbers; the other 13 tell whether shifts agree.
# A whole number, because torch.compile takes a global float for an input that may change.
COUNT_LIMIT = 2**40


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 = Σ(x − mean)² of every channel of a batch.

    A value without samples has count 0, mean 0 and M2 0.

    Attributes:
        count: values per channel, 0-d, float64: half precision would turn 100352 into inf.
        mean: shape (C,), float64, in the unit of x.
        m2: shape (C,), float64, in the squared unit of x; never negative.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def variance(self) -> Tensor:
        """Return the biased variance M2 / count, shape (C,), float64; 0 without samples."""
        return self.m2 / self.count.clamp(min=1)

    def unbiased_variance(self) -> Tensor:
        """Return M2 / (count − 1), shape (C,), float64; 0 below two samples."""
        return self.m2 / (self.count - 1).clamp(min=1)


class PackedMoments(Moments):
    """Moments that came as one vector, taken apart when somebody asks.

    Attributes:
        vector: count, means and M2, shape (2C + 1,), float64.
    """

    def __init__(self, vector: Tensor) -> None:
        object.__setattr__(self, "vector", vector)

    vector: Tensor

    @property
    def count(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] -- a frozen attribute, as before
        """See `Moments`."""
        return self.vector[0]

    @property
    def mean(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] -- as above
        """See `Moments`."""
        return self.vector[1 : (self.vector.shape[0] + 1) // 2]

    @property
    def m2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] -- as above
        """See `Moments`."""
        return self.vector[(self.vector.shape[0] + 1) // 2 :]


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
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * a.count * share)


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
    channels = (vector.numel() - 1) // 2
    count, first, second = vector[0], vector[1 : channels + 1], vector[channels + 1 :]
    offset = first / count.clamp(min=1)
    m2 = (second - first * offset).clamp(min=0)
    mean = offset if shift is None else torch.where(count > 0, offset + shift, offset)
    return Moments(count, mean, m2)


def add_fingerprint(vector: Tensor, shift: Tensor | None, rank: int, world_size: int) -> Tensor:
    """Return a vector, its count first, whose sum shows whether all ranks used the same shift.

    Adds aᵣ·h·2⁴⁰ to the count, with h a hash of the shift's bits and Σaᵣ = 0: (W − 1) for rank 0,
    −1 for the others. Equal shifts cancel exactly, in any order of summation; others leave a sum
    outside [0, 2⁴⁰), on which every rank decides alike. h has 13 − ⌈log₂ W⌉ bits, so that unequal
    shifts pass unnoticed in one call out of 4096 (W = 2) to one of 2 (W = 4096); beyond there is
    no room for a fingerprint. It is the second line of defence: the first is that a shift is the
    result of an earlier sum, hence the same on every rank.

    Args:
        vector: such as of `to_summable`: the count and sums, float64, made with the shift.
        shift: K, shape (C,), float64; None for 0.
        rank: this replica's number in its group.
        world_size: W.
    """
    bits = 13 - (world_size - 1).bit_length()
    if shift is None or bits <= 0:
        return vector
    # Any changed bit changes its word, and the sum of words modulo 2⁶⁴; an odd factor for each
    # channel, and the leading half of a word upon the other, so that neither the order of channels
    # nor an even number of signs goes unnoticed. The multiplier, 2⁶⁴ divided by the golden ratio,
    # spreads the change into the leading bits, which are the ones kept.
    words = shift.view(torch.int64)
    odd = torch.arange(1, 2 * len(shift), 2, device=shift.device)
    mixed = ((words ^ (words >> 32)) * odd).sum() * -7046029254386353131
    fingerprint = (mixed >> (64 - bits)) & ((1 << bits) - 1)
    share = (world_size - 1 if rank == 0 else -1) * COUNT_LIMIT
    return torch.cat([vector[:1] + share * fingerprint, vector[1:]])


def checked_count(vector: Tensor) -> Tensor:
    """Return the summed vector with NaN for its count where that is none, see `add_fingerprint`.

    NaN spreads to all moments: for devices on which looking at the count makes the host wait.
    """
    count = vector[:1]
    valid = (count >= 0) & (count < COUNT_LIMIT)
    return torch.cat([torch.where(valid, count, torch.nan), vector[1:]])
