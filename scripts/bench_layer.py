"""Time the synchronised layer beside torch's unsynchronised one, and its parts by themselves.

python scripts/bench_layer.py                  prints the tables
python scripts/bench_layer.py --json FILE      also writes the figures
python scripts/bench_layer.py --plot DIR       also draws pictures of them
python scripts/bench_layer.py --write          also puts tables and pictures into docs/

Ranks are processes with one thread each. What is compared takes turns within one run; a figure is
the median over the turns, each as slow as its slowest rank. Two sections time nothing: memory
counts bytes, and model computes what sums between hosts would cost.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from document import DOCUMENTS, write_table
from measure import Rows, machine, measured_on, on_ranks, progress, table, take_turns
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import syncbn
from syncbn.comm.reducer import Reducer, select_reducer
from syncbn.kernels.native import NativeKernels
from syncbn.kernels.protocol import Kernels, Normalization
from syncbn.kernels.reference import ReferenceKernels

SHAPES = [(16, 64, 56, 56), (8, 256, 14, 14), (32, 128, 16, 16), (8, 512, 4, 4), (2, 64, 28, 28)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16]
CHANNELS = [64, 512, 2048]
REDUCERS = {"shared memory": "shared_memory", "gloo": "process_group"}
TURNS = 41


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
        progress(rows[-1])
    return rows


def bench_reducers(turns: int) -> Rows:
    """One sum of a vector after the other, through shared memory and through gloo."""
    rows: Rows = []
    for channels in CHANNELS:
        vector = torch.randn(2 * channels + 1, dtype=torch.float64)
        shared_s, group_s = take_turns(_sums(vector), turns).values()
        row = {
            "W": dist.get_world_size(),
            "values": len(vector),
            "shared memory µs": shared_s * 1e6,
        }
        rows.append(row | {"gloo µs": group_s * 1e6, "ratio": group_s / shared_s})
        progress(rows[-1])
    return rows


def _sums(vector: Tensor) -> dict[str, Callable[[], Any]]:
    def summing(choice: str) -> Callable[[], Tensor]:
        reducer = select_reducer(None, vector.device, choice)
        return lambda: reducer.sum(vector)

    return {f"sum, {name}": summing(choice) for name, choice in REDUCERS.items()}


def bench_growth(turns: int) -> Rows:
    """A small layer, its sum alone, and an all-gather in the sum's place, as the world grows."""
    rows: Rows = []
    world_size = dist.get_world_size()
    # Where ranks outnumber cores, a sum takes the longer the more there are.
    turns = max(1, 2 * turns // max(2, world_size))
    for channels in CHANNELS:
        x, dy = (torch.randn(4, channels, 4, 4) for _ in range(2))
        x.requires_grad_()
        steps = {
            f"layer, {name}": _training_step(syncbn.SyncBatchNorm(channels, reducer=choice), x, dy)
            for name, choice in REDUCERS.items()
        }
        vector = torch.randn(2 * channels + 1, dtype=torch.float64)
        gathered = vector.new_empty(world_size, len(vector))

        def gather(vector: Tensor = vector, gathered: Tensor = gathered) -> Tensor:
            dist.all_gather(list(gathered.unbind()), vector)
            return gathered.sum(0)

        gloo = select_reducer(None, x.device, REDUCERS["gloo"])
        row = {"W": world_size, "C": channels, "sent B": _bytes_sent(steps["layer, gloo"], gloo)}
        taken = take_turns({**steps, **_sums(vector), "all-gather": gather}, turns)
        row |= {f"{name} µs": time_s * 1e6 for name, time_s in taken.items()}
        rows.append(row | {"gathered B": gathered.nbytes})
        progress(rows[-1])
    return rows


def _bytes_sent(step: Callable[[], None], reducer: Reducer) -> int:
    """Return how many bytes a step gives to its reducer, which is of the same class as this one."""
    cls = type(reducer)
    with mock.patch.object(cls, "sum", autospec=True, side_effect=cls.sum) as add_up:
        step()
    return sum(call.args[1].nbytes for call in add_up.call_args_list)


def bench_kernels(turns: int) -> Rows:
    """Each kernel alone in one process, as a fraction of the speed of copying such a tensor."""
    rows: Rows = []
    for row, x, dy in inputs():
        rows.append(row | _kernel_fractions(x, dy, turns))
        progress(rows[-1])
    return rows


def _kernel_fractions(x: Tensor, dy: Tensor, turns: int) -> dict[str, float]:
    y, weight, bias = torch.empty_like(x), torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    statistics = torch.ones(2 * x.shape[1] + 1, dtype=torch.float64)
    norm, sums = Normalization(statistics, weight, bias), torch.zeros_like(statistics[1:])
    # What a kernel must read and write at least, in tensors of x's size.
    tensors = {"moments": 1, "normalize": 2, "reduce": 2, "input": 3}

    def works(name: str, kernels: Kernels) -> dict[str, Callable[[], Any]]:
        return {
            f"{name} moments": lambda: kernels.local_moments(x),
            f"{name} normalize": lambda: kernels.normalize(x, norm),
            f"{name} reduce": lambda: kernels.backward_reduce(dy, x, norm),
            f"{name} input": lambda: kernels.backward_input(dy, x, norm, sums),
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


def count_memory(_turns: int) -> Rows:
    """KiB that a forward keeps for backward, of one replica, beside those of its input."""
    rows: Rows = []
    for row, x, _ in inputs():
        if row.pop("layout") != "contiguous":
            continue  # the same tensors in another order
        x.requires_grad_()
        residual, channels = torch.randn_like(x).requires_grad_(), x.shape[1]
        plain, ours = nn.BatchNorm2d(channels), syncbn.SyncBatchNorm(channels)
        fused = syncbn.SyncBatchNorm(channels, relu=True)
        row |= {
            "x": x.nbytes / 1024,
            "nn.BatchNorm2d": _kept_kib(plain, x),
            "SyncBatchNorm": _kept_kib(ours, x),
            "nn.BatchNorm2d, ReLU": _kept_kib(lambda x, f=plain: f(x).relu(), x),
            "SyncBatchNorm with ReLU": _kept_kib(fused, x),
            "nn.BatchNorm2d, + residual, ReLU": _kept_kib(
                lambda x, r, f=plain: (f(x) + r).relu(), x, residual
            ),
            "SyncBatchNorm with both": _kept_kib(fused, x, residual),
        }
        rows.append(row)
        progress(row)
    return rows


def _kept_kib(forward: Callable[..., Tensor], *arguments: Tensor) -> float:
    kept: set[tuple[int, int]] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add((tensor.data_ptr(), tensor.nbytes))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(*arguments)
    assert y.grad_fn is not None  # holds what was kept, so that no address came up twice
    return sum(size for _, size in kept) / 1024


# Seconds per message, and per byte.
NETWORKS = {
    "10 Gbit Ethernet, TCP": (30e-6, 1 / 1.25e9),
    "InfiniBand or NVLink": (3e-6, 1 / 25e9),
}
# Of a world's size: how many messages follow each other, and how many times the vector's bytes they
# have together. docs/performance.md cites the sources.
ALGORITHMS: dict[str, Callable[[int], tuple[int, float]]] = {
    "ring": lambda w: (2 * (w - 1), 2 * (w - 1) / w),
    "tree": lambda w: (2 * _log2(w), 2 * _log2(w)),
    "doubling": lambda w: (_log2(w), _log2(w)),
    "ring all-gather": lambda w: (w - 1, w - 1),
    "Bruck's all-gather": lambda w: (_log2(w), w - 1),
}
PAIRS = [("ring", "tree"), ("ring", "ring all-gather"), ("tree", "Bruck's all-gather")]
MODEL_WORLDS = [8, 64, 512, 4096]
# By stage: C of a block's three layers, and how many blocks. The first block of a stage has a layer
# more, as wide as its last, and one of 64 channels stands before all stages.
RESNET50 = [((64, 64, 256), 3), ((128, 128, 512), 4), ((256, 256, 1024), 6), ((512, 512, 2048), 3)]
RESNET50_LAYERS = [64, *(c for block, n in RESNET50 for c in (*(block * n), block[-1]))]


def _log2(w: int) -> int:
    return (w - 1).bit_length()  # rounded up


def model_costs(_turns: int) -> Rows:
    """Sums of one layer, of ResNet-50, and from how many channels on one way beats another."""
    cases = [(name, *network, w) for name, network in NETWORKS.items() for w in MODEL_WORLDS]
    rows: Rows = [
        {"network": name, "C": c, "W": w}
        | {f"{a} µs": _step_s(a, w, [c], alpha, beta) * 1e6 for a in ALGORITHMS}
        | {"gathered MB": w * (16 * c + 8) / 1e6}
        for c in (256, 2048)
        for name, alpha, beta, w in cases
    ]
    rows += [
        {"network": name, "layers": len(RESNET50_LAYERS), "W": w}
        | {f"{a} ms": _step_s(a, w, RESNET50_LAYERS, alpha, beta) * 1e3 for a in ALGORITHMS}
        for name, alpha, beta, w in cases
    ]
    return rows + [
        {"network": name, "W": w}
        | {f"{a} beats {b} from C =": _least_channels(a, b, w, alpha / beta) for a, b in PAIRS}
        for name, alpha, beta, w in cases
    ]


def _step_s(algorithm: str, w: int, layers: list[int], alpha: float, beta: float) -> float:
    """Return how long the two sums of a training step take, over layers of so many channels."""
    messages, times = ALGORITHMS[algorithm](w)
    return sum(2 * messages * alpha + times * (32 * c + 8) * beta for c in layers)


def _least_channels(winner: str, loser: str, w: int, bytes_per_message: float) -> int:
    """Return from where on the winner, of more messages and fewer bytes, is the faster one."""
    messages, times = ALGORITHMS[winner](w)
    others, other_times = ALGORITHMS[loser](w)
    step_bytes = 2 * (messages - others) * bytes_per_message / (other_times - times)
    return math.floor((step_bytes - 8) / 32) + 1


# What each section does, and in worlds of which sizes; in this process alone where there is none.
SECTIONS: dict[str, tuple[Callable[[int], Rows], list[int]]] = {
    "layer": (bench_layers, [2]),
    "reducer": (bench_reducers, [2, 4]),
    "growth": (bench_growth, [1, 2, 4, 8]),
    "kernels": (bench_kernels, []),
    "memory": (count_memory, []),
    "model": (model_costs, []),
}


def run_section(name: str, turns: int) -> Rows:
    """Measure a section, in worlds of its own processes where it has any."""
    section, world_sizes = SECTIONS[name]
    if not world_sizes:
        torch.set_num_threads(1)
        return section(turns)
    return [row for world_size in world_sizes for row in on_ranks(world_size, section, turns)]


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
    if name == "growth":
        return f"Ranks share {os.cpu_count()} cores; where they are more, they wait for one."
    if name == "memory":
        return "KiB, each tensor counted once; x is the input, which all of them keep."
    if name == "model":
        gather, tree = ALGORITHMS["ring all-gather"], ALGORITHMS["tree"]
        most = max(w for w in range(2, 4097) if gather(w) < tree(w))
        return f"The ring all-gather takes fewer steps than the tree up to W = {most}."
    return "1 is the speed of torch's copy of a tensor of the same shape."


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(SECTIONS)
    parser.add_argument("--only", choices=names, help="one section instead of all")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures of the figures")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    for name in [arguments.only] if arguments.only else names:
        rows = figures[name] = run_section(name, arguments.turns)
        tables = [table(list(group)) for _, group in itertools.groupby(rows, key=list)]
        text = "\n\n".join([*tables, summary(name, rows)])
        if name != "model":
            text += f"\n\n{measured_on(figures['machine'], arguments.turns)}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("performance.md", f"bench_layer.py {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    directories = [arguments.plot] if arguments.plot else []
    directories += [DOCUMENTS / "images"] if arguments.write else []
    if directories:
        from plots import draw  # here, so that figures alone need no matplotlib

        for directory in directories:
            draw(figures, directory)


if __name__ == "__main__":
    main()
