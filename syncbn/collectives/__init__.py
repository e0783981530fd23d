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
    def group(self) -> dist.ProcessGroup | None:
        """The process group of the replicas; None for a replica alone."""
        ...

    @property
    def world_size(self) -> int:
        """How many replicas take part."""
        ...

    @property
    def rank(self) -> int:
        """This replica's number, from 0."""
        ...

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum of every replica's vector, bit-identical on all of them.

        Collective: every replica calls it with the same shape, dtype and device, in the same order.
        """
        ...


class SingleReplica:
    """The reducer of a world of one: the vector is the sum already, nothing is sent."""

    group = None
    world_size = 1
    rank = 0

    def sum(self, vector: Tensor) -> Tensor:
        """Return the vector itself."""
        return vector


def select_reducer(process_group: dist.ProcessGroup | None) -> Reducer:
    """Return the reducer for a process group; does not communicate.

    Args:
        process_group: None means the default group, or a single replica where
            `torch.distributed` is not initialised.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SingleReplica()
        process_group = dist.group.WORLD
    assert process_group is not None  # the default group exists once initialised
    if dist.get_world_size(process_group) <= 1:
        return SingleReplica()
    return ProcessGroupReducer(process_group)


__all__ = ["ProcessGroupReducer", "Reducer", "SingleReplica", "select_reducer"]
