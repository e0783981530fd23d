"""Time the synchronised layer beside torch's unsynchronised one, and its parts by themselves.

python scripts/bench_layer.py                  prints the tables
python scripts/bench_layer.py --json FILE      also writes the figures
python scripts/bench_layer.py --write          also puts the tables into docs/performance.md

Ranks are processes with one thread each. What is compared takes turns within one run; a figure is
the median over the turns, each as slow as its slowest rank.
"""

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from document import write_table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import syncbn
from syncbn.collectives import select_reducer
from syncbn.kernels import Kernels, NativeKernels, ReferenceKernels

SHAPES = [(16, 64, 56, 56), (8, 256, 14, 14), (32, 128, 16, 16), (8, 512, 4, 4), (2, 64, 28, 28)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16]
VALUES = [129, 1025, 4097]
TURNS = 41
TURN_S = 5e-3

Rows = list[dict[str, Any]]


def take_turns(competitors: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return each competitor's median time in seconds; collective where there are several ranks."""
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


def _training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        layer(x).backward(dy)

    return step


def inputs() -> Generator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield inputs and upstream gradients, with the columns of a table that say which they are."""
    for dtype, shape, layout in itertools.product(DTYPES, SHAPES, LAYOUTS):
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        x, dy = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (x, dy))
        yield {"dtype": str(dtype)[6:], "shape": str(shape), "layout": layout}, x, dy


def bench_layers(turns: int) -> Rows:
    """Forward and backward of one layer on each rank's own input."""
    rows: Rows = []
    for row, x, dy in inputs():
        x.requires_grad_()
        channels = x.shape[1]
        torch_s, ours_s = take_turns(
            {
                "torch": _training_step(nn.BatchNorm2d(channels), x, dy),
                "syncbn": _training_step(syncbn.SyncBatchNorm(channels), x, dy),
            },
            turns,
        ).values()
        row |= {"nn.BatchNorm2d µs": torch_s * 1e6, "SyncBatchNorm µs": ours_s * 1e6}
        rows.append(row | {"ratio": ours_s / torch_s})
        _progress(rows[-1])
    return rows


def bench_reducers(turns: int) -> Rows:
    """One sum of a vector after the other, through shared memory and through gloo."""
    rows: Rows = []
    for values in VALUES:
        vector = torch.randn(values, dtype=torch.float64)

        def summing(choice: str, vector: Tensor = vector) -> Callable[[], Tensor]:
            reducer = select_reducer(None, vector.device, choice)
            return lambda: reducer.sum(vector)

        shared_s, group_s = take_turns(
            {choice: summing(choice) for choice in ("shared_memory", "process_group")}, turns
        ).values()
        row = {"W": dist.get_world_size(), "values": values, "shared memory µs": shared_s * 1e6}
        rows.append(row | {"gloo µs": group_s * 1e6, "ratio": group_s / shared_s})
        _progress(rows[-1])
    return rows


def bench_kernels(turns: int) -> Rows:
    """Each kernel alone in one process, as a fraction of the speed of copying such a tensor."""
    rows: Rows = []
    for row, x, dy in inputs():
        rows.append(row | _kernel_fractions(x, dy, turns))
        _progress(rows[-1])
    return rows


def _kernel_fractions(x: Tensor, dy: Tensor, turns: int) -> dict[str, float]:
    y, weight, bias = torch.empty_like(x), torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    invstd = torch.ones_like(mean)
    # What a kernel must read and write at least, in tensors of x's size.
    tensors = {"moments": 1, "normalize": 2, "reduce": 2, "input": 3}

    def works(name: str, kernels: Kernels) -> dict[str, Callable[[], Any]]:
        return {
            f"{name} moments": lambda: kernels.local_moments(x),
            f"{name} normalize": lambda: kernels.normalize(x, mean, invstd, weight, bias),
            f"{name} reduce": lambda: kernels.backward_reduce(dy, x, mean, invstd),
            f"{name} input": lambda: kernels.backward_input(
                dy, x, mean, invstd, weight, mean, mean
            ),
        }

    taken = take_turns(
        {
            "copy": lambda: y.copy_(x),
            **works("native", NativeKernels()),
            **works("reference", ReferenceKernels()),
        },
        turns,
    )
    tensor_s = taken.pop("copy") / 2
    return {name: tensors[name.split()[1]] * tensor_s / time_s for name, time_s in taken.items()}


SECTIONS = {"layer": (bench_layers, [2]), "reducer": (bench_reducers, [2, 4])}


def _be_rank(rank: int, world_size: int, port: int, name: str, turns: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    rows = SECTIONS[name][0](turns)
    dist.barrier()
    if rank == 0:
        Path(file).write_text(json.dumps(rows))
    dist.destroy_process_group()


def run_section(name: str, turns: int) -> Rows:
    """Measure a section in worlds of its own processes."""
    if name == "kernels":
        torch.set_num_threads(1)
        return bench_kernels(turns)
    rows: Rows = []
    for world_size in SECTIONS[name][1]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.json"
            spawn(_be_rank, (world_size, port, name, turns, str(file)), nprocs=world_size)
            rows += json.loads(file.read_text())
    return rows


def table(rows: Rows) -> str:
    """Return rows as a table in markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) and v < 10 else _whole(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _whole(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def summary(name: str, rows: Rows) -> str:
    """Return a sentence about a section's bars."""
    if name == "layer":
        parts: list[str] = []
        for dtype in ("float32", "bfloat16"):
            ratios = [row["ratio"] for row in rows if row["dtype"] == dtype]
            mean, worst = statistics.geometric_mean(ratios), max(ratios)
            parts.append(f"{dtype}: geometric mean {mean:.2f}, worst {worst:.2f}")
        return "; ".join(parts) + ". The bars for float32 are 0.6 and 1.0."
    if name == "reducer":
        return "The bars are ratios of 30 at W = 2, and of 4 where ranks outnumber cores."
    return "1 is the speed of torch's copy of a tensor of the same shape."


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


def _progress(row: dict[str, Any]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*row.values(), file=sys.stderr)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["layer", "reducer", "kernels"]
    parser.add_argument("--only", choices=names, help="one section instead of all")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    for name in [arguments.only] if arguments.only else names:
        rows = figures[name] = run_section(name, arguments.turns)
        text = f"{table(rows)}\n\n{summary(name, rows)}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("performance.md", f"bench_layer.py {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
