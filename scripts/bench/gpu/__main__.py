"""Measure the layer on a GPU beside torch's; or count, without one, what it gives a GPU to do.

python -m scripts.bench.gpu                 measures, prints tables and whether the bars are kept
python -m scripts.bench.gpu --json FILE     also writes the figures
python -m scripts.bench.gpu --plot DIR      also draws pictures of them
python -m scripts.bench.gpu --write         also puts tables and pictures into docs/
python -m scripts.bench.gpu --budget        counts bytes, launches, waits and memory on the CPU
python -m scripts.bench.gpu --tiny          runs every section on the CPU, to find typing errors

What is compared takes turns within one run, on tensors that do not fit into the cache together, and
a figure is the median. Sections, and in them the kinds of inputs, come in the order of what matters
most, and what is left when the time is over is not measured. A section that fails says so, and the
others go on. With --tiny nothing is a measurement: kernels are interpreted, and torch's operations,
which it has for CUDA alone, are replaced by plain formulas.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from scripts.bench.measure import Rows, machine, table
from scripts.dev.document import DOCUMENTS, write_table

# The share of the time for each section, by name; what one leaves, the next ones have too.
SHARES = {"kernels": 0.3, "layers": 0.45, "resnet": 0.12, "ranks": 0.1, "observed": 0.03}
BUDGET_SECTIONS = ["bytes", "launches", "memory"]


def describe(device: torch.device) -> dict[str, Any]:
    """Return what is measured, and by which versions."""
    found = machine() | {"triton": triton.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["cuda"] = torch.version.cuda
    return found


def budget(only: str | None) -> dict[str, Any]:
    """Count, print and return the sections of the budget."""
    from scripts.bench.gpu.budget import SECTIONS, verdict  # imports the kernels; see main

    figures: dict[str, Any] = {}
    for name in [only] if only else BUDGET_SECTIONS:
        rows = figures[name] = SECTIONS[name]()
        print(f"\n## {name}\n\n{table(rows)}\n\n{verdict(name, rows)}", flush=True)
    return figures


def measure(device: torch.device, only: str | None, budget_s: float) -> dict[str, Any]:
    """Measure, print and return the sections; a table of bars last."""
    # They import the kernels; see main.
    from scripts.bench.gpu.kernels import bench_kernels
    from scripts.bench.gpu.layers import bench_layers
    from scripts.bench.gpu.observed import observe_launches
    from scripts.bench.gpu.ranks import bench_ranks
    from scripts.bench.gpu.resnet import bench_resnet
    from scripts.bench.gpu.run import Run
    from scripts.bench.gpu.verdicts import report, verdicts
    from scripts.bench.gpu.warm import warm

    sections: dict[str, Callable[[Run], Rows]] = {
        "kernels": bench_kernels,
        "layers": bench_layers,
        "resnet": bench_resnet,
        "ranks": bench_ranks,
        "observed": observe_launches,
    }
    figures: dict[str, Any] = {}
    end = time.monotonic() + budget_s
    if device.type == "cuda":
        try:
            print(warm(torch.cuda.get_device_capability(device)), flush=True)
        except Exception:  # then they are compiled as they are met
            traceback.print_exc()
    deadline = time.monotonic()
    budget_s = end - deadline
    for name in [only] if only else sections:
        deadline += budget_s * (1 if only else SHARES[name])
        start = time.monotonic()
        try:
            rows = sections[name](Run(device, deadline))
            print(f"\n## {name}\n\n{report(name, rows)}")
            figures[name] = rows
        except Exception:  # whatever it was, the other sections shall be measured
            print(f"\n## {name}\n\nfailed:\n{traceback.format_exc()}")
        print(f"\n{name} took {time.monotonic() - start:.0f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    figures["verdicts"] = verdicts(figures)
    if device.type == "cpu":
        for row in figures["verdicts"]:
            row["verdict"] = "interpreted: not a measurement"
    print(f"\n## bars\n\n{table(figures['verdicts'])}", flush=True)
    return figures


def write(figures: dict[str, Any], counted: bool) -> None:
    """Put the tables into docs/gpu.md."""
    from scripts.bench.gpu.budget import verdict
    from scripts.bench.gpu.verdicts import report

    parts: list[str] = []
    for name, rows in figures.items():
        if name == "machine":
            continue
        parts.append(report(name, rows))
        if counted:
            parts.append(verdict(name, rows))
    if not counted:
        parts.append("Measured on: " + ", ".join(f"{k} {v}" for k, v in figures["machine"].items()))
    source = "scripts.bench.gpu --budget" if counted else "scripts.bench.gpu"
    write_table("gpu.md", source, "\n\n".join(parts))


def main() -> None:
    """Measure or count what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", action="store_true", help="count, without a GPU")
    parser.add_argument("--tiny", action="store_true", help="try all sections out, without a GPU")
    parser.add_argument("--only", choices=[*SHARES, *BUDGET_SECTIONS], help="one section")
    parser.add_argument("--budget-s", type=float, default=240, help="time for all sections")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures of the figures")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    arguments = parser.parse_args()
    if arguments.only and (arguments.only in BUDGET_SECTIONS) != arguments.budget:
        parser.error(f"--only {arguments.only} is a section of another run; see --budget")
    if arguments.tiny and arguments.write:
        parser.error("--tiny measures nothing that could be written into docs/")
    device = torch.device("cpu" if arguments.budget or arguments.tiny else "cuda")
    if device.type == "cpu":
        # Before the kernels are imported.
        os.environ |= {"TRITON_INTERPRET": "1", "SYNCBN_KERNELS": "triton"}
    elif not torch.cuda.is_available():
        parser.error("there is no GPU: see --budget and --tiny")
    figures: dict[str, Any] = {"machine": describe(device)}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n", flush=True)
    if arguments.tiny:
        print("interpreted: not a measurement")
    if arguments.budget:
        figures |= budget(arguments.only)
    elif arguments.tiny:
        from scripts.bench.gpu.interpreted import interpreting_quickly  # as in budget

        with interpreting_quickly():
            figures |= measure(device, arguments.only, arguments.budget_s)
    else:
        figures |= measure(device, arguments.only, arguments.budget_s)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.write:
        write(figures, arguments.budget)
    directories = [arguments.plot] if arguments.plot else []
    directories += [DOCUMENTS / "images"] if arguments.write else []
    if directories and not arguments.budget:
        from scripts.bench.gpu.plots import draw  # here, so that figures alone need no matplotlib

        for directory in directories:
            draw(figures, directory)


if __name__ == "__main__":
    main()
