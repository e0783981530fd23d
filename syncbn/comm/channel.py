"""Memory mapped by all ranks of one host; `syncbn/_native/channel.cpp` says how it is used."""

import ctypes
import mmap
import os
import secrets
import select
import time
import weakref
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _native
from syncbn.comm import fork
from syncbn.comm.gather import all_gather
from syncbn.errors import ReplicaError

# Values per slot; a longer vector is summed in several rounds.
_CAPACITY = 8192
# How long the library waits before Python looks for signals, dead peers and the deadline.
_SLICE_US = 50_000
# A few tenths of a millisecond of looking for a peer's post before other processes may run, if each
# rank has a core of its own.
_SPINS = 20_000


class Member(NamedTuple):
    """A rank of this host.

    Attributes:
        number: its number in the whole group.
        pid: its process.
    """

    number: int
    pid: int


class Channel:
    """Sums contiguous float64 vectors over the ranks of one host. Not for several threads at once.

    A rank that waits sleeps after some microseconds. If a peer dies, gives up, sends another number
    of values or is late by the time-out, the wait ends with an error, as do all later calls.

    Args:
        memory: mapped by all members.
        members: the ranks of this host, in the order of their numbers.
        rank: this rank's place among them.
        timeout: how long to wait for a peer.
    """

    def __init__(
        self, memory: mmap.mmap, members: list[Member], rank: int, timeout: timedelta
    ) -> None:
        assert _native.library is not None  # or there would be no memory
        self.rank = rank
        self._memory = memory
        self._members = members
        self._timeout_s = timeout.total_seconds()
        self._round = 0
        self._broken: str | None = None
        self._library = _native.library
        self._sum = self._library.syncbn_channel_sum
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._me = _native.Channel(base, _CAPACITY, len(members), rank)
        spins = _SPINS if len(members) <= len(os.sched_getaffinity(0)) else 0
        # Converted to C once instead of at every call.
        self._waits = ctypes.c_int32(spins), ctypes.c_int64(_SLICE_US)
        self._peers: dict[int, int] = {}  # each peer's process, as a descriptor
        weakref.finalize(self, _close, self._peers, fork.depth).atexit = False
        for peer, member in enumerate(members):
            if peer != rank:
                self._peers[peer] = os.pidfd_open(member.pid)

    @classmethod
    def open(
        cls,
        members: list[Member],
        number: int,
        group: dist.ProcessGroup,
        timeout: timedelta,
        until_mapped: ExitStack,
    ) -> "Channel | None":
        """Return a channel to the other ranks of this host, or None if that is impossible.

        The host's first rank makes the memory, and the others open it under the first one's
        descriptor, which `until_mapped` keeps open. Communicates: one all-gather over the group,
        whose every rank calls this.
        """
        rank = next(i for i, member in enumerate(members) if member.number == number)
        assert _native.library is not None  # or this rank would not have named a host
        size = _native.library.syncbn_channel_size(len(members), _CAPACITY)
        size += mmap.PAGESIZE  # the last page begins with the key
        descriptor, key = -1, 0
        with suppress(OSError):  # the members then find no memory under the descriptor -1
            if rank == 0:
                key = secrets.randbits(62)
                descriptor = os.memfd_create("syncbn", os.MFD_CLOEXEC)
                until_mapped.callback(os.close, descriptor)
                os.truncate(descriptor, size)
                os.pwrite(descriptor, key.to_bytes(8, "little"), size - mmap.PAGESIZE)
        offers = all_gather([descriptor, key], group)
        theirs, key = offers[members[0].number]
        try:
            if theirs < 0:
                return None
            if rank != 0:
                path = f"/proc/{members[0].pid}/fd/{theirs}"
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                until_mapped.callback(os.close, descriptor)
            memory = mmap.mmap(descriptor, size)
            if memory[size - mmap.PAGESIZE :][:8] != key.to_bytes(8, "little"):
                return None  # something else is open under that number: another container's
            return cls(memory, members, rank, timeout)
        except (OSError, ValueError):
            return None

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over this host's ranks of a contiguous float64 vector on the CPU.

        Raises:
            ReplicaError: see the class.
        """
        total = torch.empty_like(values)
        size = values.numel()
        if size <= _CAPACITY:
            self._sum_part(values.data_ptr(), total.data_ptr(), size, size)
            return total
        for start in range(0, size, _CAPACITY):
            part = min(_CAPACITY, size - start)
            offset = 8 * start
            self._sum_part(values.data_ptr() + offset, total.data_ptr() + offset, part, size)
        return total

    def _sum_part(self, values: int, total: int, n: int, whole: int) -> None:
        """Sum n of the whole vector's values, from one address to another."""
        if self._broken is not None:
            raise ReplicaError(f"shared memory failed earlier: {self._broken}")
        self._round = round_ = (self._round + 1) & 0xFFFFFFFF
        try:
            state = self._sum(self._me, round_, values, total, n, whole, *self._waits)
            if state != -1:
                self._wait(state, round_, total, n, whole)
        except BaseException:
            self.give_up()
            raise

    def _wait(self, state: int, round_: int, total: int, n: int, whole: int) -> None:
        """Collect a round after the library came back without the sum, with a state instead."""
        deadline = time.monotonic() + self._timeout_s
        while state >= 0:
            trouble = self._trouble(state, deadline)
            # Once more after looking: the peer may have posted, and then died.
            state = self._library.syncbn_channel_collect(
                self._me, round_, total, n, whole, *self._waits
            )
            if state >= 0 and trouble:
                raise self._fail(trouble)
        if state < -1:
            number = self._members[-2 - state].number
            mine = self._members[self.rank].number
            raise self._fail(
                f"rank {number} and rank {mine} sum vectors of different sizes, {mine} one of "
                f"{whole} values: they are not at the same call"
            )

    def _trouble(self, missing: int, deadline: float) -> str | None:
        """Return why it is no use to wait for a rank of this host, or None."""
        number, pid = self._members[missing]
        rank = f"rank {number} (process {pid} on this host)"
        poller = select.poll()
        poller.register(self._peers[missing], select.POLLIN)
        gone = poller.poll(0)
        # Asked after that, because it outlives the process: a rank that gives up mostly ends then,
        # and whether it has ended by now must not change what is said of it.
        if self._library.syncbn_channel_gave_up(self._me, missing):
            return f"{rank} gave up, and says why itself"
        if gone:
            return f"{rank} is gone"
        if time.monotonic() > deadline:
            return f"{rank} did not come within the group's time-out of {self._timeout_s:g} s"
        return None

    def _fail(self, reason: str) -> ReplicaError:
        self._broken = reason
        return ReplicaError(reason)

    def give_up(self) -> None:
        """Tell the other ranks of this host that this one posts no more."""
        self._broken = self._broken or "this rank was interrupted"
        self._library.syncbn_channel_give_up(self._me)


def _close(descriptors: dict[int, int], depth: int) -> None:
    # A forked child may have closed them, and opened something else under the same numbers.
    if depth == fork.depth:
        for descriptor in descriptors.values():
            os.close(descriptor)
