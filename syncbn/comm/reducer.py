"""Summing a small vector over ranks, and the choice of who does it.

Every reducer passes `tests/contracts/test_reducers.py`.
"""

import os
import weakref
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.process_group import ProcessGroupReducer
from syncbn.comm.shared_memory import SharedMemoryReducer
from syncbn.errors import InputError


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


VARIABLE = "SYNCBN_REDUCER"
CHOICES = ("auto", "shared_memory", "process_group")
_shared: "weakref.WeakKeyDictionary[dist.ProcessGroup, SharedMemoryReducer]"
_shared = weakref.WeakKeyDictionary()


def select_reducer(
    process_group: dist.ProcessGroup | None,
    device: torch.device | None = None,
    choice: str | None = None,
) -> Reducer:
    """Return the reducer for a process group; does not communicate.

    On the CPU, ranks of one host sum in shared memory; every other device, and ranks that cannot
    share memory, use the process group.

    Args:
        process_group: None means the default group, or a single replica where
            `torch.distributed` is not initialised.
        device: of the vectors to sum; None means the CPU.
        choice: `shared_memory` insists on it, and fails where it is impossible; `process_group`
            does without; `auto` is the rule. None takes the environment variable SYNCBN_REDUCER, or
            `auto`. All ranks must choose the same.

    Raises:
        InputError: the choice is none of these, or shared memory for a device or group without.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SingleReplica()
        process_group = dist.group.WORLD
    assert process_group is not None  # the default group exists once initialised
    if dist.get_world_size(process_group) <= 1:
        return SingleReplica()
    if torch.compiler.is_compiling():  # a graph holds a group by its name, and selects when it runs
        return ProcessGroupReducer(process_group)
    choice = choice or os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise InputError(
            f"the reducer, or {VARIABLE}, is {choice!r}; set it to {' or '.join(CHOICES)}"
        )
    insist = choice == "shared_memory"
    on_cpu = device is None or device.type == "cpu"
    if insist and not on_cpu:
        raise InputError(
            f"shared memory was chosen, and the vectors are on {device}; it is for the CPU alone, "
            "choose 'auto' or 'process_group'"
        )
    if choice == "process_group" or not on_cpu:
        return ProcessGroupReducer(process_group)
    reducer = _shared.get(process_group)
    if reducer is not None and reducer.insist == insist:
        return reducer
    if not _exchanges_on_cpu(process_group):
        if insist:
            backends = dist.get_backend_config(process_group)
            raise InputError(
                f"shared memory was chosen, and the group's backends are {backends}; it takes gloo "
                "for the CPU, choose 'auto' or 'process_group'"
            )
        return ProcessGroupReducer(process_group)
    reducer = _shared[process_group] = SharedMemoryReducer(process_group, insist)
    return reducer


def _exchanges_on_cpu(group: dist.ProcessGroup) -> bool:
    """Return whether a group's ranks are real and can talk to each other about CPU memory."""
    return "cpu:gloo" in dist.get_backend_config(group)


__all__ = [
    "CHOICES",
    "ProcessGroupReducer",
    "Reducer",
    "SharedMemoryReducer",
    "SingleReplica",
    "select_reducer",
]
