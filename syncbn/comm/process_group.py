"""The reducer that works everywhere: one all-reduce of a `torch.distributed` process group."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroupReducer:
    """Sums over the ranks of a process group, of any backend and device.

    Attributes:
        group: the process group. Its time-out bounds every wait.
    """

    group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        """How many ranks the group has."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This replica's number in the group."""
        return dist.get_rank(self.group)

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum over the group's ranks; one all-reduce of the vector's size."""
        total = vector.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total
