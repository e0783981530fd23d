"""Run a function on every rank of a small CPU world, with a deadline for all of it."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Fills fresh allocations with NaN, so that no test passes on memory that happened to be 0. Here and
# not in each rank, because it takes a second, and forked ranks inherit it.
torch.use_deterministic_algorithms(True)

# Forked from a server that has loaded what ranks need: one starts in milliseconds instead of
# seconds. DDP brings torch._dynamo, the digits scikit-learn, the curves matplotlib, and the module
# of the function to run brings pytest, which would be most of what a small world costs.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("pytest", "hypothesis.strategies"),
        *("torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"),
        *("syncbn.train.launch.supervisor", "tests.support.jobs"),
    ]
)


class WorldError(Exception):
    """A rank raised, died or missed the deadline; the message says which, with its traceback."""


def run_world(
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    deadline_s: float = 60,
    grace_s: float = 0,
) -> list[T]:
    """Call function(*args) on each rank of a gloo process group; return the results by rank.

    The function must be importable and its result picklable. Ranks that are left when one fails,
    or at the deadline, are killed; `grace_s` later, for those that shall react to the failure.

    Raises:
        WorldError: for the first rank that failed.
    """
    deadline = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = Path(directory) / "rendezvous"
        ranks: list[Any] = []
        pipes: list[connection.Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = CONTEXT.Pipe(duplex=False)
                target = (rank, world_size, rendezvous, deadline_s, sender, function, args)
                process = CONTEXT.Process(target=_be_rank, args=target, daemon=True)
                process.start()
                sender.close()  # so that a rank that dies closes the pipe
                ranks.append(process)
                pipes.append(receiver)
            results = _collect(pipes, deadline)
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            return results
        finally:
            latest = min(deadline, time.monotonic() + grace_s)
            for process in ranks:
                process.join(max(0.0, latest - time.monotonic()))
                process.kill()
                process.join()


def _collect(pipes: list[connection.Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorldError(f"ranks {sorted(waiting.values())} missed the deadline")
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise WorldError(f"rank {waiting[pipe]} died without a word") from None
            if not succeeded:
                raise WorldError(f"rank {waiting[pipe]} failed:\n{value}")
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _be_rank(
    rank: int,
    world_size: int,
    rendezvous: Path,
    deadline_s: float,
    sender: connection.Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=rendezvous.as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=deadline_s),
        )
        dist.barrier()  # a rank that finishes before another has connected would break its start
        message = (True, function(*args))
    except BaseException:  # whatever it was, the parent shall hear of it
        message = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    if dist.is_initialized():
        dist.destroy_process_group()
