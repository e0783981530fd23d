"""Time the synchronized layer beside torch's unsynchronized one, and its parts by themselves.

python -m scripts.bench.layer                  prints the tables
python -m scripts.bench.layer --json FILE      also writes the figures
python -m scripts.bench.layer --plot DIR       also draws pictures of them
python -m scripts.bench.layer --write          also puts tables and pictures into docs/
python -m scripts.bench.layer --against PATH   only compares with the layer of another checkout

Ranks are processes with one thread each. What is compared takes turns within one run; a figure is
the median over the turns, each as slow as its slowest rank. Two sections time nothing: memory
counts bytes, and model computes what sums between hosts would cost.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.bench.layer import against
from scripts.bench.layer.costs import ALGORITHMS, model_costs
from scripts.bench.layer.kernels import bench_kernels
from scripts.bench.layer.memory import count_memory
from scripts.bench.layer.reducers import bench_growth, bench_reducers
from scripts.bench.layer.step import bench_layers
from scripts.bench.measure import Rows, machine, measured_on, on_ranks, table
from scripts.dev.document import DOCUMENTS, write_table

TURNS = 41

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
        prog="python -m scripts.bench.layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=list(SECTIONS), help="one section instead of all")
    parser.add_argument("--turns", type=int, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures of the figures")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="another checkout, with its native kernels compiled: print its layer's times "
        "(before), this one's (after) and torch's side by side, on 1 and 2 ranks; takes minutes",
    )
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(SECTIONS)
    if arguments.against:
        if arguments.only or arguments.plot or arguments.write:
            parser.error("--against goes with --turns and --json alone")
        if not (arguments.against / "syncbn" / "__init__.py").exists():
            parser.error(f"--against: {arguments.against} is no checkout of this project")
        names = []
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n", flush=True)
    if arguments.against:
        turns = arguments.turns or against.TURNS
        rows = figures["against"] = against.compare(arguments.against.resolve(), turns)
        print(f"\n## against {arguments.against}\n\n{against.report(rows)}")
        print(f"\n{measured_on(figures['machine'], turns)}")
    turns = arguments.turns or TURNS
    for name in names:
        rows = figures[name] = run_section(name, turns)
        tables = [table(list(group)) for _, group in itertools.groupby(rows, key=list)]
        text = "\n\n".join([*tables, summary(name, rows)])
        if name != "model":
            text += f"\n\n{measured_on(figures['machine'], turns)}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("performance.md", f"scripts.bench.layer {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    directories = [arguments.plot] if arguments.plot else []
    directories += [DOCUMENTS / "images"] if arguments.write else []
    if directories:
        from scripts.bench.layer.plots import draw  # here, so that figures alone need no matplotlib

        for directory in directories:
            draw(figures, directory)


if __name__ == "__main__":
    main()
