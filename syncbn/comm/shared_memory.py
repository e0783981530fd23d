"""The reducer of CPU ranks that share a host: memory that all of them map, and no sockets."""

import os
import secrets
import threading
import weakref
import zlib
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _native
from syncbn.comm.channel import Channel, Member
from syncbn.comm.gather import all_gather
from syncbn.comm.process_group import GroupMember, ProcessGroupReducer
from syncbn.errors import InputError

# Connections between the first ranks of a group's hosts. They live as long as the group: nothing
# else holds them, neither a reducer nor torch.distributed's own list of groups.
_connections: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroupGloo]"
_connections = weakref.WeakKeyDictionary()


class SharedMemoryReducer(GroupMember):
    """Sums vectors of any length over a group whose ranks, or some of them, share a host.

    The ranks of one host sum in shared memory, in float64 and in the order of their numbers. If the
    group spans several hosts, the first rank of each sums with the other first ones over gloo, and
    passes the total on. On the first sum the ranks find out who is where: three all-gathers of a
    few bytes over the group, and connections among the hosts.

    The memory has no name in the file system (memfd), so that nothing is left of it when the last
    process is gone, however it ended, and nothing of an earlier run can be mistaken for it.

    Keeps neither the group nor any of its threads alive. May be called by several threads.

    Args:
        group: the process group. Its time-out bounds every wait.
        insist: whether to fail if the ranks cannot share memory; they otherwise sum over the
            process group.

    Attributes:
        insist: as passed.
        world_size: how many ranks the group has.
        rank: this replica's number in the group.
    """

    def __init__(self, group: dist.ProcessGroup, insist: bool) -> None:
        super().__init__(group)
        self.insist = insist
        self._lock = threading.Lock()
        self._route: Channel | _SeveralHosts | ProcessGroupReducer | None = None

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        """Return the sum over the group's ranks, always as a new vector.

        Raises:
            InputError: the ranks cannot share memory, and were to insist on it, or their choices
                differ; on every rank.
            ReplicaError: a peer died, gave up, sent another number of values or missed the group's
                time-out; or this process was forked from the group's member.
        """
        # Before the lock, which a thread that the child does not have may hold.
        self.require_own_process()
        with self._lock:
            route = self._route or self._connect()
            if vector.dtype is torch.float64 and vector.is_cpu and vector.is_contiguous():
                return route.sum(vector)  # the layers' vectors
            if isinstance(route, ProcessGroupReducer):
                return route.sum(vector)
            values = vector.detach().to("cpu", torch.float64).contiguous()
            return route.sum(values).to(vector.device, vector.dtype)

    def _connect(self) -> "Channel | _SeveralHosts | ProcessGroupReducer":
        """Find out which way to sum, and remember and return it."""
        group = self.group
        timeout = _timeout(group)
        here = host() if _native.library is not None else 0
        places = all_gather([here, os.getpid(), int(self.insist), secrets.randbits(62)], group)
        hosts, pids, insist, keys = zip(*places, strict=True)
        if len(set(insist)) > 1:
            raise InputError(
                f"the ranks' choices of a reducer differ (which insist on shared memory: "
                f"{[bool(each) for each in insist]}); choose the same on all of them"
            )
        leaders = sorted({hosts.index(other) for other in hosts})
        possible = 0 not in hosts and (len(leaders) < self.world_size or self.insist)
        channel = None
        with ExitStack() as until_mapped:
            if possible:
                peers = [number for number, other in enumerate(hosts) if other == here]
                members = [Member(number, pids[number]) for number in peers]
                channel = Channel.open(members, self.rank, group, timeout, until_mapped)
            mapped = all_gather([int(channel is not None)], group)
        if not all(ok for (ok,) in mapped):
            if self.insist:
                raise InputError(
                    "the ranks cannot share memory, and SYNCBN_REDUCER or an argument insists on "
                    "it: it takes Linux, the native library on every rank, and ranks of one user "
                    "and one container; choose 'auto' or 'process_group'"
                )
            self._route = ProcessGroupReducer(group)
            return self._route
        assert channel is not None  # as on every rank
        if len(leaders) == 1:
            self._route = channel
            return channel
        self._route = _SeveralHosts(channel, group)
        if self.rank in leaders:
            try:
                _connections[group] = _connection(leaders.index(self.rank), leaders, keys, timeout)
            except BaseException:
                channel.give_up()
                raise
        return self._route


class _SeveralHosts(GroupMember):
    """Sums in the shared memory of each host, and over gloo among the first ranks of the hosts."""

    def __init__(self, channel: Channel, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._channel = channel

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the group's ranks of a contiguous float64 vector on the CPU."""
        total = self._channel.sum(values)
        if self._channel.rank != 0:
            # The total of all hosts, plus zeros of those that did not fetch it.
            return self._channel.sum(torch.zeros_like(total))
        try:
            _connections[self.group].allreduce([total]).wait()  # pyright: ignore[reportAttributeAccessIssue] -- its stub lacks what it inherits
        except BaseException:
            self._channel.give_up()
            raise
        return self._channel.sum(total)


def _connection(
    place: int, leaders: list[int], keys: tuple[int, ...], timeout: timedelta
) -> dist.ProcessGroupGloo:
    """Return this rank's connection to the first ranks of the other hosts.

    Not made by `new_group`, because torch.distributed would keep such a group until the default
    group is destroyed.

    Args:
        place: this rank's place among the leaders.
        leaders: the hosts' first ranks, by their numbers in the group.
        keys: a random number of each rank; the first one's tells this connection from all others.
        timeout: how long to wait for the other leaders.
    """
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] -- through which every group's ranks find each other
    own = dist.PrefixStore(f"syncbn/hosts/{keys[0]}", store)  # pyright: ignore[reportPrivateImportUsage] -- documented
    return dist.ProcessGroupGloo(own, place, len(leaders), timeout)


def host() -> int:
    """Return a number that ranks have in common if they can share memory; 0 if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "user")]
    except OSError:
        return 0
    identity = "\n".join([boot, *namespaces, str(os.getuid())]).encode()
    # Two checksums, because a collision would take two hosts for one; their keys would then differ.
    return zlib.crc32(identity) << 31 | zlib.adler32(identity) >> 1 | 1


def _timeout(group: dist.ProcessGroup) -> timedelta:
    backend = group._get_backend(torch.device("cpu"))  # pyright: ignore[reportPrivateUsage] -- nothing public tells a group's time-out
    backend = getattr(backend, "wrapped_pg", backend)  # under TORCH_DISTRIBUTED_DEBUG=DETAIL
    options = getattr(backend, "options", None)
    return getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)
