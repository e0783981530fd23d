"""Summing a small vector over ranks, and the choice of who does it.

Every reducer passes `tests/contracts/test_reducers.py`.
"""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.process_group import ProcessGroupReducer


class Reducer(Protocol):
    """Adds a vector up over all replicas."""

    @property
    def world_size(self) -> int:
        """How many replicas take part."""
        ...

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum of every replica's vector, bit-identical on all of them.

        Collective: every replica calls it with the same shape, dtype and device, in the same order.
        """
        ...


class SingleReplica:
    """The reducer of a world of one: the vector is the sum already, nothing is sent."""

    world_size = 1

    def sum(self, vector: Tensor) -> Tensor:
        """Return the vector itself."""
        return vector


def select_reducer(process_group: dist.ProcessGroup | None) -> Reducer:
    """Return the reducer for a process group; does not communicate.

    Args:
        process_group: None means the default group, or a single replica where
            `torch.distributed` is not initialised.
    """
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return SingleReplica()
    if dist.get_world_size(process_group) <= 1:
        return SingleReplica()
    return ProcessGroupReducer(process_group)


__all__ = ["ProcessGroupReducer", "Reducer", "SingleReplica", "select_reducer"]
