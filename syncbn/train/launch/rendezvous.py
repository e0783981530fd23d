"""One message for all ranks of an attempt, through a store that may remember earlier attempts."""

import json
import secrets
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
    Store,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.errors import TrainingError

_POLL_S = 0.02


def agree(
    store: Store, rank: int, world_size: int, message: Callable[[], str], timeout_s: float
) -> tuple[str, str]:
    """Return rank 0's message, and a prefix for the store's keys that no other attempt has.

    torchrun may start the ranks again with the same store, in which keys of the dead are left
    (torch 2.14), and a count of restarts is not the same on all machines. So each rank signs in
    with a token of its own, rank 0 answers with all the tokens that it sees and a fresh prefix,
    again whenever it sees others, and it is over when every rank has found its own token in the
    answer.

    Args:
        store: what all ranks can reach, and nobody else.
        rank: this rank.
        world_size: how many there are.
        message: called on rank 0.
        timeout_s: how long ranks may take to come.

    Raises:
        TrainingError: not all ranks came.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        return _lead(store, world_size, message(), deadline)
    return _follow(store, rank, deadline)


def prefixed(prefix: str, store: Store) -> Store:
    """Return a view of a store in which all keys begin with a prefix."""
    return PrefixStore(prefix, store)


def _lead(store: Store, world_size: int, message: str, deadline: float) -> tuple[str, str]:
    others = range(1, world_size)
    answered: list[str] | None = None
    prefix = ""
    while True:
        tokens = [_read(store, f"syncbn/hello/{rank}") for rank in others]
        if tokens != answered:
            answered, prefix = tokens, f"syncbn/{secrets.token_hex(8)}"
            answer = {"prefix": prefix, "tokens": tokens, "message": message}
            store.set("syncbn/answer", json.dumps(answer))
        missing = [rank for rank in others if not store.check([f"{prefix}/found/{rank}"])]
        if not missing:
            break
        if time.monotonic() > deadline:
            raise TrainingError(f"ranks {missing} did not come; see what they say, if they started")
        time.sleep(_POLL_S)
    store.set(f"{prefix}/complete", "")
    # Rank 0 may host the store, and must not take it away before all have read it.
    for rank in others:
        store.wait([f"{prefix}/read/{rank}"], timedelta(seconds=10))
    return message, prefix


def _follow(store: Store, rank: int, deadline: float) -> tuple[str, str]:
    token = secrets.token_hex(8)
    store.set(f"syncbn/hello/{rank}", token)
    while time.monotonic() < deadline:
        answer = json.loads(_read(store, "syncbn/answer") or "{}")
        tokens = answer.get("tokens", [])
        if len(tokens) >= rank and tokens[rank - 1] == token:
            prefix = answer["prefix"]
            store.set(f"{prefix}/found/{rank}", "")
            if store.check([f"{prefix}/complete"]):
                store.set(f"{prefix}/read/{rank}", "")
                return answer["message"], prefix
        time.sleep(_POLL_S)
    raise TrainingError(f"rank {rank} waited in vain for rank 0 and the others to come")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
