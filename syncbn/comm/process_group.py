"""The reducer that works everywhere: one collective of a `torch.distributed` process group."""

import weakref
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from syncbn.comm import fork
from syncbn.errors import ReplicaError

# Its name since torch 2.14; before, it is the other one's.
_NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_all_gather: Callable[..., object] = getattr(dist, _NAME)


class GroupMember:
    """This process as a member of a process group, which it does not keep alive.

    The graph of an old loss may hold a reducer for longer than the user wants the group, and its
    threads, to live.

    Args:
        group: the process group.

    Attributes:
        world_size: how many ranks the group has.
        rank: this replica's number in the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._depth = fork.depth

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            ReplicaError: it has been destroyed.
        """
        group = self._group()
        if group is None:
            raise ReplicaError("the process group has been destroyed")
        return group

    def require_own_process(self) -> None:
        """Raise in a child that was forked from the member.

        Raises:
            ReplicaError: this is one.
        """
        if self._depth != fork.depth:
            raise fork.refuse()

    def gather(self, vector: Tensor) -> Tensor:
        """Return the vectors of all ranks, in their order; one all-gather.

        Args:
            vector: shape (n,), of the same n and dtype on every rank.

        Returns:
            Shape (W, n).

        Raises:
            ReplicaError: this process was forked from the group's member, or the group has been
                destroyed.
        """
        self.require_own_process()
        rows = vector.new_empty(self.world_size * vector.shape[0])
        _all_gather(rows, vector, group=self.group)
        return rows.view(self.world_size, -1)


class ProcessGroupReducer(GroupMember):
    """Sums over the ranks of a process group, of any backend and device.

    Does not keep the group alive. The group's time-out bounds every wait.
    """

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        """Return the sum over the group's ranks; one all-reduce of the vector's size.

        Args:
            vector: one of this rank's.
            overwrite: whether the sum may take its place, which spares a copy.

        Raises:
            ReplicaError: this process was forked from the group's member, or the group has been
                destroyed.
        """
        self.require_own_process()
        total = vector if overwrite else vector.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total
