"""What the benchmarks share: ranks, taking turns, tables, and the machine's name."""

import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

# Long beside the moment by which one rank leaves a barrier after the other.
TURN_S = 50e-3
TIMEOUT = timedelta(seconds=120)

# For glibc; read when a process starts.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

Rows = list[dict[str, Any]]


def take_turns(competitors: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return each competitor's median time in seconds; collective where there are several ranks.

    A turn is as long as its slowest rank's, and repeats what takes less than TURN_S.
    """
    repeats: dict[str, int] = {}
    for name, work in competitors.items():
        for _ in range(3):
            work()
        repeats[name] = max(1, round(TURN_S / _slowest(_time(work, 3))))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(turns):
        for name, work in competitors.items():
            times[name].append(_slowest(_time(work, repeats[name])))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _time(work: Callable[[], Any], repeats: int) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def _slowest(time_s: float) -> float:
    if not dist.is_initialized():
        return time_s
    slowest = torch.tensor(time_s, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def on_ranks(world_size: int, section: Callable[[int], Rows], turns: int) -> Rows:
    """Return what a section measures as rank 0 of a world of processes with one thread each.

    The system places them, as it does for torchrun. Each keeps the memory that it has freed, which
    otherwise goes back to the system and is cleared page by page when it comes again: a millisecond
    or more a step, at whose turn is by chance.
    """
    os.environ |= KEEP_MEMORY
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.json"
        arguments = world_size, port, section, turns, str(file)
        spawn(_be_rank, arguments, nprocs=world_size)
        return json.loads(file.read_text())


def _be_rank(
    rank: int, world_size: int, port: int, section: Callable[[int], Rows], turns: int, file: str
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    rows = section(turns)
    dist.barrier()
    if rank == 0:
        Path(file).write_text(json.dumps(rows))
    dist.destroy_process_group()


def progress(row: dict[str, Any]) -> None:
    """Show a row on rank 0 as soon as it is measured."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*row.values(), file=sys.stderr)


def table(rows: Rows) -> str:
    """Return rows as a table in markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) and v < 10 else _whole(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _whole(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def measured_on(machine: dict[str, Any], turns: int) -> str:
    """Return the line under a table that says where its figures come from."""
    torch_version = machine["torch"].partition("+")[0]
    return (
        f"Measured on: {machine['processor']}, {machine['cores']} cores, torch {torch_version}, "
        f"{machine['date']}, `--turns {turns}`."
    )
