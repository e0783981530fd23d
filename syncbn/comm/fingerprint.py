"""Whether all ranks summed about the same shift: a hash of it, hidden in the sum of counts."""

import ctypes

import torch
from torch import Tensor

from syncbn import _native
from syncbn._native.plain import are_plain
from syncbn.moments import mixed_bits

# Totals fit in 40 of float64's 53 bits of whole numbers; the other 13 tell whether shifts agree.
COUNT_LIMIT = 2**40


def add_fingerprint(vector: Tensor, shift: Tensor, rank: int, world_size: int) -> Tensor:
    """Add to a vector's count, in place, what shows in the sum whether all shifts were the same.

    It is aᵣ·h·2⁴⁰, with h a hash of the shift's bits and Σaᵣ = 0: (W − 1) for rank 0, −1 for the
    others. Equal shifts cancel exactly, in any order of summation; others leave a sum outside
    [0, 2⁴⁰), on which every rank decides alike. h has 13 − ⌈log₂ W⌉ bits, so that unequal shifts
    pass unnoticed in one call out of 4096 (W = 2) to one of 2 (W = 4096); beyond there is no room
    for a fingerprint. It is the second line of defense: the first is that a shift is the result of
    an earlier sum, hence the same on every rank.

    Args:
        vector: the count and sums, float64, made about the shift.
        shift: K, float64, contiguous.
        rank: this replica's number in its group.
        world_size: W.

    Returns:
        The vector.
    """
    bits = 13 - (world_size - 1).bit_length()
    if bits <= 0:
        return vector
    library = _native.library
    if library is not None and are_plain(vector, shift):
        count = vector.data_ptr()
        library.syncbn_add_fingerprint(shift.data_ptr(), shift.numel(), rank, world_size, count)
        return vector
    # Of the mixed bits, the leading ones depend on all others.
    fingerprint = (mixed_bits(shift) >> (64 - bits)) & ((1 << bits) - 1)
    vector[0] += (world_size - 1 if rank == 0 else -1) * COUNT_LIMIT * fingerprint
    return vector


def is_valid(count: float) -> bool:
    """Return whether a summed count shows that all ranks summed about the same shift."""
    return 0 <= count < COUNT_LIMIT


def count_of(total: Tensor) -> float:
    """Return the count of a sum on the CPU."""
    if are_plain(total):  # torch's own indexing takes ten times as long
        return ctypes.c_double.from_address(total.data_ptr()).value
    return total[0].item()


def invalidate(vector: Tensor) -> Tensor:
    """Return a summed vector with NaN for an invalid count.

    NaN spreads to all moments: for devices on which looking at the count makes the host wait.
    """
    count = vector[:1]
    valid = (count >= 0) & (count < COUNT_LIMIT)
    return torch.cat([torch.where(valid, count, torch.nan), vector[1:]])
