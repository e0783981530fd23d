"""Telling a forked child from its parent, for whom it must not speak.

A child inherits its parent's process groups, shared memory and connections, but not the threads
that serve them, and its parent's peers do not know of it. If it communicated, it would hang, or be
taken for its parent.
"""

import os
import weakref

import torch.distributed as dist

from syncbn.errors import ReplicaError

# How many forks lie between the process that imported this module and the present one. Counted by a
# hook instead of asking for the process's number at every sum, which is a system call.
depth = 0
_inherited: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()


def refuse() -> ReplicaError:
    """Return the error for a child that uses what belongs to its parent."""
    return ReplicaError(
        f"process {os.getpid()} was forked from a member of the process group and cannot "
        "communicate over it: call a synchronized layer in a DataLoader worker, or another forked "
        "child, in eval mode only; or start the process with the 'spawn' method, and give it a "
        "process group of its own"
    )


def require_own(group: dist.ProcessGroup) -> None:
    """Raise if a process group was inherited from a parent.

    Raises:
        ReplicaError: it was.
    """
    if group in _inherited:
        raise refuse()


def _after_in_child() -> None:
    global depth
    depth += 1
    if dist.is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- nothing public lists the groups


os.register_at_fork(after_in_child=_after_in_child)
