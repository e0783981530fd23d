"""Time recovery: from a kill to the next step, what many kills cost, and the jobs of a sweep.

python -m scripts.bench.recovery                  prints the tables
python -m scripts.bench.recovery --section NAME   prints one: restart, goodput or sweep
python -m scripts.bench.recovery --json FILE      also writes the figures
python -m scripts.bench.recovery --write          also puts the tables into docs/reliability.md

Jobs have two ranks with one thread each, write a checkpoint every 20 steps (the digits) or 10 (the
ResNet-18), and are started by `syncbn-train`, or, the same trainer, by torchrun.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.measure import Rows, machine, measured_on, table
from scripts.bench.recovery.sections import (
    JOBS,
    KILL_EVERY_S,
    KILLS,
    bench_goodput,
    bench_restarts,
    bench_sweeps,
)
from scripts.dev.document import write_table

# What each section does, and how many turns.
SECTIONS: dict[str, tuple[Callable[[int], Rows], int]] = {
    "restart": (bench_restarts, 11),
    "goodput": (bench_goodput, 3),
    "sweep": (bench_sweeps, 3),
}


def summary(name: str) -> str:
    """Return what the figures of a section are."""
    if name == "restart":
        return (
            "Seconds from SIGKILL of one of two ranks to the next optimizer step, which repeats "
            "work since the checkpoint; medians of the turns. The bar for the digits is 1.0 s."
        )
    if name == "goodput":
        return (
            f"The steps that were made, and not lost again, in {KILLS * KILL_EVERY_S:.0f} s in "
            f"which every {KILL_EVERY_S:.0f} s a rank was killed, of those that the same job makes "
            "without."
        )
    return (
        f"Seconds from the end of a job to the end of the next, less the training of that one, for "
        f"sweeps of {JOBS} jobs; the bar is 0.7 s. Training is what result.json calls duration_s: "
        "two steps, an evaluation, a checkpoint, the bundle and the picture. Before the first: the "
        "command, its configurations, and a process that loads torch."
    )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--section", choices=list(SECTIONS), help="one section instead of all")
    parser.add_argument("--turns", type=int, help="how often each is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    for name in [arguments.section] if arguments.section else list(SECTIONS):
        section, turns = SECTIONS[name]
        turns = arguments.turns or turns
        rows = figures[name] = section(turns)
        text = f"{table(rows)}\n\n{summary(name)}\n\n{measured_on(figures['machine'], turns)}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("reliability.md", f"scripts.bench.recovery {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
