"""How a sum shows whether all ranks summed about the same shift."""

import math

import pytest
import torch
from torch import Tensor

from syncbn import _native
from syncbn.comm.fingerprint import COUNT_LIMIT, add_fingerprint, invalidate, is_valid
from syncbn.moments import from_summable

CHANNELS = 4
WRONG_COUNTS = [-1.0, 2.0**40, math.nan, math.inf]


def _vector() -> Tensor:
    return torch.ones(2 * CHANNELS + 1, dtype=torch.float64)


def _doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("world_size", [2, 3, 7, 64])
def test_fingerprints_of_equal_shifts_cancel_and_of_others_do_not(world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(CHANNELS, dtype=torch.float64, generator=generator)
    noticed = 0
    trials = 100
    for trial in range(trials):
        other = shift.clone()
        other[trial % CHANNELS] = math.nextafter(float(other[trial % CHANNELS]), math.inf) + trial
        counts = [0.0, 0.0]
        for rank in torch.randperm(world_size, generator=generator).tolist():
            for case, odd in enumerate((shift, other)):
                mine = odd if rank == trial % world_size else shift
                counts[case] += float(add_fingerprint(_vector(), mine, rank, world_size)[0])
        assert counts[0] == world_size
        assert is_valid(counts[0])
        noticed += not is_valid(counts[1])
    missed = 2.0 ** -(13 - (world_size - 1).bit_length())
    assert noticed >= trials * (1 - missed) - 4 * math.sqrt(trials * missed)


def test_fingerprints_tell_the_order_of_channels_and_an_even_number_of_signs() -> None:
    shift = _doubles(1, 2, 3, 4)
    for other in ([-1.0, -2, 3, 4], [2.0, 1, 3, 4], [4.0, 3, 2, 1], [-1.0, -2, -3, -4]):
        mine, theirs = (
            add_fingerprint(_vector(), each, rank, 2)[0]
            for rank, each in enumerate((shift, _doubles(*other)))
        )
        assert not is_valid(float(mine + theirs))


def test_count_alone_changes_in_place() -> None:
    vector = _vector()
    assert add_fingerprint(vector, _doubles(1, 2, 3, 4), 0, 2) is vector
    assert vector[0] != 1
    assert torch.equal(vector[1:], _vector()[1:])


@pytest.mark.parametrize("world_size", [2, 3, 64, 4096, 4097, 10_000])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "shift",
    [
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        _doubles(-0.0, math.inf, -math.inf, math.nan, 5e-324),
        _doubles(7),
    ],
    ids=["random", "unusual", "one"],
)
def test_native_version_is_the_pytorch_version_bit_for_bit(
    world_size: int, rank: int, shift: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _native.library is not None
    native = add_fingerprint(_vector(), shift, rank, world_size)
    monkeypatch.setattr(_native, "library", None)
    assert torch.equal(native, add_fingerprint(_vector(), shift, rank, world_size))


def test_no_fingerprint_has_room_beyond_4096_ranks() -> None:
    shift = _doubles(1, 2, 3, 4)
    assert not torch.equal(add_fingerprint(_vector(), shift, 1, 4096), _vector())
    assert torch.equal(add_fingerprint(_vector(), shift, 1, 4097), _vector())


def test_counts_below_the_limit_are_valid() -> None:
    for count in (0.0, 1.0, COUNT_LIMIT - 1.0):
        vector = _vector()
        vector[0] = count
        assert is_valid(count)
        assert torch.equal(invalidate(vector), vector)


@pytest.mark.parametrize("count", WRONG_COUNTS)
def test_invalid_count_makes_all_moments_nan(count: float) -> None:
    vector = _vector()
    vector[0] = count
    assert not is_valid(count)
    moments = from_summable(invalidate(vector), torch.zeros(CHANNELS, dtype=torch.float64))
    assert moments.mean.isnan().all()
    assert moments.variance().isnan().all()
