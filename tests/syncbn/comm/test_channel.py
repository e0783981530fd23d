"""The library's part of an exchange through shared memory."""

import ctypes
import mmap

import pytest
import torch

from syncbn import _native
from tests.support.forked import in_forked_child

pytestmark = pytest.mark.skipif(_native.library is None, reason="needs the native kernels")


def _wait_with_most_spins() -> int:
    assert _native.library is not None
    capacity, world = 8, 2
    memory = mmap.mmap(-1, _native.library.syncbn_channel_size(world, capacity))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    channel = _native.Channel(base, capacity, world, 0)
    values, total = torch.ones(1, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    of_values = values.data_ptr(), total.data_ptr()
    return _native.library.syncbn_channel_sum(channel, 1, *of_values, 1, 1, 2**31 - 1, 1000)


def test_looking_for_a_post_ends_with_the_time_however_often_it_may_look() -> None:
    assert in_forked_child(_wait_with_most_spins) == 1  # the rank that did not come
