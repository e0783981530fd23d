"""Time training: its step, its loop beside others, and what goes before the first step.

python -m scripts.bench.train                  prints the tables
python -m scripts.bench.train --section NAME   prints one: layers, loop, start or sweep
python -m scripts.bench.train --json FILE      also writes the figures
python -m scripts.bench.train --write          also puts the tables into docs/performance.md

What is compared takes turns within one run; a figure is the median over the turns. Ranks have one
thread each. layers: steps of a ResNet-18 of which only the normalization differs. loop: epochs of
this trainer, of a loop written by hand, and of lightning, where it is installed. start: from the
command to the first optimizer step. sweep: what a job of a sweep takes beyond its training.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.measure import Rows, machine, measured_on, on_ranks, table
from scripts.bench.train.commands import bench_starts, bench_sweeps
from scripts.bench.train.loop import bench_loops
from scripts.bench.train.step import bench_steps
from scripts.dev.document import write_table

# What each section does, in worlds of which sizes, if in any but this process, and how many turns.
SECTIONS: dict[str, tuple[Callable[[int], Rows], list[int], int]] = {
    "layers": (bench_steps, [1, 2], 15),
    "loop": (bench_loops, [1, 2], 15),
    "start": (bench_starts, [], 5),
    "sweep": (bench_sweeps, [], 3),
}


def run_section(name: str, turns: int) -> Rows:
    """Measure a section, in worlds of its own processes where it has any."""
    section, world_sizes, _ = SECTIONS[name]
    if not world_sizes:
        return section(turns)
    return [row for world_size in world_sizes for row in on_ranks(world_size, section, turns)]


def summary(name: str, rows: Rows) -> str:
    """Return a sentence about a section's bars."""
    if name == "layers":
        worst = {
            name: max(row[f"{name} ratio"] for row in rows if row["W"] == 2)
            for name in ("SyncBatchNorm", "fused")
        }
        return "Ratios are over nn.BatchNorm2d; the bar at W = 2 is 1.0. The worst: " + (
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items()) + "."
        )
    if name == "loop":
        worst_loop = max(row["ours ratio"] for row in rows)
        return (
            "Ratios are medians of an epoch's time over that by hand in the same turn. The bar for "
            f"ours is 1.02; the worst is {worst_loop:.3f}. By hand, DDP broadcasts buffers before "
            "each step, as it does by default."
        )
    if name == "start":
        return (
            "To the first optimizer step; error: to the end of a command with optim.lr=high, for "
            "which the bar is 2 s."
        )
    return (
        "Seconds of each job beyond its training, which is what result.json calls duration_s: "
        "the first steps, an evaluation, a checkpoint and the bundle."
    )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--section", choices=list(SECTIONS), help="one section instead of all")
    parser.add_argument("--turns", type=int, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    for name in [arguments.section] if arguments.section else list(SECTIONS):
        turns = arguments.turns or SECTIONS[name][2]
        rows = figures[name] = run_section(name, turns)
        measured = measured_on(figures["machine"], turns)
        text = f"{table(rows)}\n\n{summary(name, rows)}\n\n{measured}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("performance.md", f"scripts.bench.train {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
