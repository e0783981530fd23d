"""Finding out what every replica is doing, for when they do not do the same."""

from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from syncbn.errors import ReplicaError


def exchange(group: dist.ProcessGroup, position: str, timeout_s: float) -> list[str | None]:
    """Tell all ranks of a group what this one is doing, and return what each of them is.

    Goes through the store of `init_process_group`, not through the group, so that it works while
    collectives do not fit each other. The n-th exchange of each rank meets the n-th of the others.
    Communicates: one short string written, W read.

    Args:
        group: the process group.
        position: what this rank is doing.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Returns:
        By rank in the group; None for a rank that said nothing in time.

    Raises:
        ReplicaError: the store cannot be reached.
    """
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] -- the one store that every rank has for certain
    rank = dist.get_rank(group)
    room = f"syncbn/{group.group_name}"
    try:
        number = store.add(f"{room}/{rank}", 1)
        store.set(f"{room}/{rank}/{number}", position)
        if number > 2:  # whoever is at number - 1 has read number - 2
            store.delete_key(f"{room}/{rank}/{number - 2}")
        keys = [f"{room}/{other}/{number}" for other in range(dist.get_world_size(group))]
        # Where some key never comes, those that did are read all the same.
        with suppress(RuntimeError):
            store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key).decode() if store.check([key]) else None for key in keys]
    except RuntimeError as error:
        raise ReplicaError(
            f"rank {rank} {position} and cannot reach the store of init_process_group; the process "
            "that keeps it, rank 0 as a rule, is gone"
        ) from error


def require_agreement(group: dist.ProcessGroup, position: str, timeout_s: float) -> None:
    """Raise on every rank unless all of them are at the same place; see `exchange`.

    Raises:
        ReplicaError: a rank is elsewhere, or said nothing in time; the text says which, and where.
    """
    positions = exchange(group, position, timeout_s)
    if any(other != position for other in positions):
        places = "; ".join(
            f"rank {rank} {other or f'has said nothing for {timeout_s:g} s'}"
            for rank, other in enumerate(positions)
        )
        raise ReplicaError(
            f"the replicas do not make the same call: {places} (this is rank "
            f"{dist.get_rank(group)}); every rank must call the same layers in the same order"
        )
