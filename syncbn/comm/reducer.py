"""Summing a small vector over ranks, and the choice of who does it.

Every reducer passes `tests/contracts/test_reducers.py`, but for the one that takes GPUs: it has
`tests/syncbn/comm/test_symmetric_memory.py`.
"""

import os
import weakref
from types import FunctionType
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor

from syncbn.comm import fork
from syncbn.comm.process_group import ProcessGroupReducer
from syncbn.comm.shared_memory import SharedMemoryReducer
from syncbn.comm.symmetric_memory import SymmetricMemoryReducer
from syncbn.environment import REDUCER, variable
from syncbn.errors import InputError

# torch.distributed.nn.functional has the default group of the moment when it is first imported as a
# default argument, and the first optimizer imports it. A group that was initialized by then would
# live until the interpreter is finalized, and its threads would now and then abort the process
# while it ends. Hence imported here; and if a group got there before, give the functions what they
# have if imported early: None, which means the default group at the time of the call.
for _function in vars(torch.distributed.nn.functional).values():
    if isinstance(_function, FunctionType) and _function.__defaults__ is not None:
        _function.__defaults__ = tuple(
            None if isinstance(default, dist.ProcessGroup) else default
            for default in _function.__defaults__
        )


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

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        """Return the sum of every replica's vector, bit-identical on all of them.

        With overwrite, it may take the vector's place. Collective: every replica calls it with the
        same shape, dtype and device, in the same order.
        """
        ...

    def gather(self, vector: Tensor) -> Tensor:
        """Return every replica's vector, shape (W, n), in the order of ranks; collective too."""
        ...


class SingleReplica:
    """The reducer of a world of one: the vector is the sum already, nothing is sent."""

    group = None
    world_size = 1
    rank = 0

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        """Return the vector itself."""
        return vector

    def gather(self, vector: Tensor) -> Tensor:
        """Return the vector as the only row."""
        return vector.unsqueeze(0)


_SINGLE = SingleReplica()

CHOICES = ("auto", "shared_memory", "process_group", "symmetric_memory")

# What was selected for a group, by (choice, whether the vectors are on the CPU). No reducer keeps
# its group alive, so that a group's entry goes away with it.
_selected: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, bool], Reducer]]"
_selected = weakref.WeakKeyDictionary()
# A forked child selects for itself, and finds out that the groups are its parent's.
os.register_at_fork(after_in_child=_selected.clear)


def select_reducer(
    process_group: dist.ProcessGroup | None,
    device: torch.device | None = None,
    choice: str | None = None,
) -> Reducer:
    """Return the reducer for a process group; does not communicate.

    On the CPU, ranks of one host sum in shared memory; every other device, and ranks that cannot
    share memory, use the process group.

    Args:
        process_group: None means the default group, or a single replica if `torch.distributed` is
            not initialized.
        device: of the vectors to sum; None means the CPU.
        choice: `shared_memory` insists on it, and fails if it is impossible; `process_group` does
            without; `symmetric_memory` takes the memory of GPUs that reach each other's, which has
            never run on several GPUs and is no part of `auto`, and fails if it is impossible;
            `auto` is the rule. None takes the environment variable SYNCBN_REDUCER, or `auto`. All
            ranks must choose the same.

    Raises:
        InputError: the choice is none of these, or shared or symmetric memory for a device or
            group without.
        ReplicaError: this process was forked from a member of the group, and is none itself.
    """
    group = dist.group.WORLD if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):  # not initialized, or not a member of the group
        return _SINGLE
    if torch.compiler.is_compiling():  # a graph holds a group by its name, and selects when it runs
        return _SINGLE if dist.get_world_size(group) <= 1 else ProcessGroupReducer(group)
    wish = choice or variable(REDUCER) or "auto", device is None or device.type == "cpu"
    known = _selected.get(group)
    reducer = None if known is None else known.get(wish)
    if reducer is None:
        reducer = _select(group, *wish, device)
        # Of several threads that come here first, all get the same.
        reducer = _selected.setdefault(group, {}).setdefault(wish, reducer)
    return reducer


def _select(
    group: dist.ProcessGroup, choice: str, on_cpu: bool, device: torch.device | None
) -> Reducer:
    if dist.get_world_size(group) <= 1:
        return _SINGLE
    fork.require_own(group)
    if choice not in CHOICES:
        raise InputError(
            f"the reducer, or {REDUCER}, is {choice!r}; set it to {' or '.join(CHOICES)}"
        )
    if choice == "symmetric_memory":
        return _symmetric(group, device)
    insist = choice == "shared_memory"
    if insist and not on_cpu:
        raise InputError(
            f"shared memory was chosen, and the vectors are on {device}; it is for the CPU alone, "
            "choose 'auto' or 'process_group'"
        )
    if choice != "process_group" and on_cpu:
        if exchanges_on_cpu(group):
            return SharedMemoryReducer(group, insist)
        if insist:
            backends = dist.get_backend_config(group)
            raise InputError(
                f"shared memory was chosen, and the group's backends are {backends}; it takes gloo "
                "for the CPU, choose 'auto' or 'process_group'"
            )
    return ProcessGroupReducer(group)


def _symmetric(group: dist.ProcessGroup, device: torch.device | None) -> SymmetricMemoryReducer:
    if device is None or device.type != "cuda":
        raise InputError(
            f"symmetric memory was chosen, and the vectors are on {device or 'cpu'}; it is for "
            "GPUs alone, choose 'auto' or 'process_group'"
        )
    backends = dist.get_backend_config(group)
    if not {"cuda:nccl", "cuda:gloo"} & set(backends.split(",")):
        raise InputError(
            f"symmetric memory was chosen, and the group's backends are {backends}; it takes nccl "
            "or gloo for GPUs, choose 'auto' or 'process_group'"
        )
    return SymmetricMemoryReducer(group)


def exchanges_on_cpu(group: dist.ProcessGroup) -> bool:
    """Return whether a group's ranks are real and can talk to each other about CPU memory."""
    return "cpu:gloo" in dist.get_backend_config(group).split(",")


__all__ = [
    "CHOICES",
    "ProcessGroupReducer",
    "Reducer",
    "SharedMemoryReducer",
    "SingleReplica",
    "SymmetricMemoryReducer",
    "exchanges_on_cpu",
    "select_reducer",
]
