"""What all ranks must decide alike: an error of one of them, and a signal to stop."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from syncbn.errors import SyncBNError

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Do something on every rank, and raise the first rank's error of ours on all of them.

    Collective: one all-gather of the errors' texts.
    """
    value: Any = None
    error: SyncBNError | None = None
    try:
        value = work()
    except SyncBNError as raised:
        error = raised
    for each in gathered(error):
        if each is not None:
            raise each
    return value


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, in their order.

    Collective: one all-gather of the pickled values.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Return the value of rank 0.

    Collective: one broadcast of the pickled value.
    """
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
