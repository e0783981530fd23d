"""End many small distributed programs, and count how they ended.

Run as `python -m tests.support.endings ORDER PAIRS`. ORDER is `wrapper_deleted`, as in README.md,
or `wrapper_kept`, with which the process group's threads outlive `destroy_process_group`. A thread
that drops the last reference to a tensor while the interpreter is finalized aborts the process;
whether it comes to that is a matter of scheduling, so the threads run at the lowest priority, and a
process whose threads outlive their group says so with its exit code, even if it gets away with it.

Prints, as JSON, how many processes ended with which status.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport] -- loaded once, not by each process
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

DEADLINE_S = 400
_PAIR_DEADLINE_S = 120
THREADS_OUTLIVE = 3  # the exit code
_kept: list[object] = []


def _train_and_end(rank: int, store: Path, order: str) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.randn(8, 4)).square().sum()
    loss.backward()
    optimizer.step()
    names = list(Path("/proc/self/task").glob("*/comm"))
    threads = [path.parent for path in names if "gloo_runloop" in path.read_text()]
    assert threads
    dist.barrier()
    for thread in threads:
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    dist.all_reduce(torch.ones(4))
    if order == "wrapper_kept":
        _kept.append(model)
    del model
    dist.destroy_process_group()
    return THREADS_OUTLIVE if any(thread.exists() for thread in threads) else 0


def _start(rank: int, store: Path, order: str) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(_PAIR_DEADLINE_S)
        # Unlike a child of multiprocessing, which does not finalize the interpreter.
        sys.exit(_train_and_end(rank, store, order))
    return child


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return signal.Signals(-code).name
    return "finished" if code == 0 else f"code {code}"


def main(order: str, pairs: int) -> None:
    """End pairs of processes, and print how they ended; start no pair after the deadline."""
    deadline = time.monotonic() + DEADLINE_S - _PAIR_DEADLINE_S
    ends: Counter[str] = Counter()
    directory = Path(tempfile.mkdtemp())  # not by `with`, which a child would leave as well
    for number in range(pairs):
        if time.monotonic() > deadline:
            break
        children = [_start(rank, directory / str(number), order) for rank in range(2)]
        ends.update(_describe(os.waitpid(child, 0)[1]) for child in children)
    shutil.rmtree(directory)
    sys.stdout.write(json.dumps(ends) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
