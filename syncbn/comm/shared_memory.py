"""The reducer of CPU ranks that share a host: memory that all of them map, and no sockets."""

import ctypes
import mmap
import os
import secrets
import select
import threading
import time
import weakref
import zlib
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _native
from syncbn.comm.process_group import ProcessGroupReducer
from syncbn.errors import InputError, ReplicaError

# Values a slot holds; longer vectors go in several rounds.
_CAPACITY = 8192
# How long the library waits before Python looks after signals, dead peers and the deadline.
_SLICE_US = 50_000
# Some tenths of a millisecond of looking for a peer's post before others may run, if there is a
# core for each rank.
_SPINS = 20_000


class SharedMemoryReducer:
    """Sums float64 vectors of any length over a group whose ranks, or some of them, share a host.

    The ranks of one host add up in shared memory, in the order of their numbers. Where the group
    spans several hosts, the first rank of each adds up with the other first ones over a process
    group of their own, and passes the total on. On the first sum the ranks find out who is where:
    three all-gathers of a few bytes over the group, and a new group among the hosts.

    The memory has no name in the file system (memfd), so that nothing is left of it when the last
    process is gone, however it went, and nothing of an earlier run can be mistaken for it.

    A rank that waits sleeps after some microseconds. A peer that dies, gives up, sends another
    number of values or is missing at the group's time-out ends the wait with an error, there and
    on all later calls.

    Args:
        group: the process group.
        insist: whether sharing is a must, and to fail where it is impossible, or a wish, and to
            sum over the process group there.
    """

    def __init__(self, group: dist.ProcessGroup, insist: bool) -> None:
        self._group = weakref.ref(group)  # the group's reducer must not keep it alive
        self.insist = insist
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._lock = threading.Lock()
        self._route: _Channel | ProcessGroupReducer | None = None
        self._spans_hosts = False
        self._hosts: ProcessGroupReducer | None = None  # of the first ranks of each host

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        group = self._group()
        if group is None:
            raise ReplicaError("the process group has been destroyed")
        return group

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum over the group's ranks.

        Raises:
            InputError: sharing memory is impossible, and was insisted on; on every rank.
            ReplicaError: see the class.
        """
        with self._lock:
            if self._route is None:
                self._connect()
            if isinstance(self._route, ProcessGroupReducer):
                return self._route.sum(vector)
            assert self._route is not None  # connected
            if vector.dtype is torch.float64 and vector.is_contiguous():  # the layers' vectors
                total = self._route.sum(vector)
                return self._pass_on(total) if self._spans_hosts else total
            values = vector.detach().to(torch.float64).contiguous()
            total = self._route.sum(values)
            if self._spans_hosts:
                total = self._pass_on(total)
            return total.reshape(vector.shape).to(vector.dtype)

    def _pass_on(self, total: Tensor) -> Tensor:
        """Return the sum over the hosts' totals, which the first rank of each host fetches."""
        assert isinstance(self._route, _Channel)
        if self._route.rank != 0:
            # The total of all hosts, plus zeros of those that did not fetch it.
            return self._route.sum(torch.zeros_like(total))
        assert self._hosts is not None  # as for every first rank where there are several hosts
        try:
            total = self._hosts.sum(total)
        except BaseException:
            self._route.give_up()
            raise
        return self._route.sum(total)

    def _connect(self) -> None:
        group = self.group
        timeout = _timeout(group)
        host = _host() if _native.library is not None else 0
        places = _all_gather([host, os.getpid(), int(self.insist)], group)
        if len({insist for _, _, insist in places}) > 1:
            raise InputError(
                f"the ranks' choices of a reducer differ (which insist on shared memory: "
                f"{[bool(insist) for _, _, insist in places]}); choose the same on all of them"
            )
        hosts = [place[0] for place in places]
        peers = [number for number, other in enumerate(hosts) if other == host]
        leaders = sorted({hosts.index(other) for other in hosts})
        possible = 0 not in hosts and (len(leaders) < self.world_size or self.insist)
        channel = None
        with ExitStack() as until_mapped:
            if possible:
                members = [_Member(number, places[number][1]) for number in peers]
                channel = _Channel.open(members, self.rank, group, timeout, until_mapped)
            mapped = _all_gather([int(channel is not None)], group)
        if not all(ok for (ok,) in mapped):
            if self.insist:
                raise InputError(
                    "the ranks cannot share memory, and SYNCBN_REDUCER or an argument insists on "
                    "it: it takes Linux, the native library on every rank, and ranks of one user "
                    "and one container; choose 'auto' or 'process_group'"
                )
            self._route = ProcessGroupReducer(group)
            return
        assert channel is not None  # all are well, this rank too
        self._spans_hosts = len(leaders) > 1
        if self._spans_hosts and self.rank in leaders:
            ranks = dist.get_process_group_ranks(group)
            between = dist.new_group(
                [ranks[leader] for leader in leaders],
                timeout=timeout,
                backend="gloo",
                use_local_synchronization=True,
            )
            assert isinstance(between, dist.ProcessGroup)  # this rank is one of them
            self._hosts = ProcessGroupReducer(between)
        self._route = channel


class _Member(NamedTuple):
    """A rank of this host: its number in the whole group, and its process."""

    number: int
    pid: int


class _Channel:
    """Memory mapped by all ranks of one host; `syncbn/_native/channel.cpp` says how it is used."""

    def __init__(
        self, memory: mmap.mmap, members: list[_Member], rank: int, timeout: timedelta
    ) -> None:
        self._memory = memory
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._members = members
        self.rank = rank
        self._timeout_s = timeout.total_seconds()
        self._round = 0
        self._broken: str | None = None
        self._spins = _SPINS if len(members) <= len(os.sched_getaffinity(0)) else 0
        self._peers = {
            number: os.pidfd_open(member.pid)
            for number, member in enumerate(members)
            if number != rank
        }
        self._channel = _native.Channel(self._base, _CAPACITY, len(members), rank)
        weakref.finalize(self, _close_all, list(self._peers.values()))

    @classmethod
    def open(
        cls,
        members: list[_Member],
        number: int,
        group: dist.ProcessGroup,
        timeout: timedelta,
        until_mapped: ExitStack,
    ) -> "_Channel | None":
        """Return a channel to the other ranks of this host; None where that is impossible.

        The host's first rank makes the memory, and the others open it under the first one's
        descriptor, which `until_mapped` keeps open. Communicates: one all-gather over the group,
        whose every rank calls this.
        """
        rank = next(i for i, member in enumerate(members) if member.number == number)
        assert _native.library is not None  # or this rank's host would be none
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
        offers = _all_gather([descriptor, key], group)
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
        """Return the sum over this host's ranks of a float64 vector."""
        total = torch.empty_like(values)
        whole, value, sum_ = values.numel(), values.data_ptr(), total.data_ptr()
        for start in range(0, max(whole, 1), _CAPACITY):
            n = min(_CAPACITY, whole - start)
            self._sum_part(value + 8 * start, sum_ + 8 * start, n, whole)
        return total

    def _sum_part(self, values: int, total: int, n: int, whole: int) -> None:
        """Add up n of the whole vector's values, from one address to another."""
        library = _native.library
        assert library is not None  # or there would be no channel
        if self._broken is not None:
            raise ReplicaError(f"shared memory failed earlier: {self._broken}")
        self._round = round_ = (self._round + 1) & 0xFFFFFFFF
        channel, me = self._channel, self.rank
        how_long = self._spins, _SLICE_US
        try:
            state = library.syncbn_channel_sum(channel, round_, values, total, n, whole, *how_long)
            if state == -1:
                return
            arguments = channel, round_, total, n, whole, *how_long
            deadline = time.monotonic() + self._timeout_s
            while state >= 0:
                trouble = self._trouble(state, deadline)
                # Once more after looking: it may have posted, and then gone.
                state = library.syncbn_channel_collect(*arguments)
                if state >= 0 and trouble:
                    raise self._fail(trouble)
            if state < -1:
                number = self._members[-2 - state].number
                mine = self._members[me].number
                raise self._fail(
                    f"rank {number} and rank {mine} sum vectors of different sizes, {mine} one of "
                    f"{whole} values: they are not at the same call"
                )
        except BaseException:
            self.give_up()
            raise

    def _trouble(self, missing: int, deadline: float) -> str | None:
        """Return why waiting for a rank of this host is of no use, if it is not."""
        number, pid = self._members[missing]
        poller = select.poll()
        poller.register(self._peers[missing], select.POLLIN)
        if poller.poll(0):
            return f"rank {number} (process {pid} on this host) is gone"
        assert _native.library is not None
        if _native.library.syncbn_channel_gave_up(self._channel, missing):
            return f"rank {number} (process {pid} on this host) gave up, and says why itself"
        if time.monotonic() > deadline:
            return (
                f"rank {number} (process {pid} on this host) did not come within the group's "
                f"time-out of {self._timeout_s:g} s"
            )
        return None

    def _fail(self, reason: str) -> ReplicaError:
        self._broken = reason
        return ReplicaError(reason)

    def give_up(self) -> None:
        """Let the other ranks of this host know that this one posts no more."""
        self._broken = self._broken or "this rank was interrupted"
        assert _native.library is not None
        _native.library.syncbn_channel_give_up(self._channel)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _host() -> int:
    """Return a number that ranks have in common where one can reach the other's memory; 0: none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "user")]
    except OSError:
        return 0
    identity = "\n".join([boot, *namespaces, str(os.getuid())]).encode()
    # Two checksums, since a collision would put two hosts into one: their keys would then differ.
    return zlib.crc32(identity) << 31 | zlib.adler32(identity) >> 1 | 1


def _timeout(group: dist.ProcessGroup) -> timedelta:
    backend = group._get_backend(torch.device("cpu"))  # pyright: ignore[reportPrivateUsage] -- nothing public tells a group's time-out
    options = getattr(backend, "options", None)
    return getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)


def _all_gather(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    mine = torch.tensor(numbers, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [theirs.tolist() for theirs in everyone]
