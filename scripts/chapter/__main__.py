"""Compute and draw what docs/why.md shows: data and pictures of the claims of the chapter."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from scripts.chapter import experiments, jobs, plots
from scripts.dev.document import DOCUMENTS, write_table

Data = dict[str, Any]
IMAGES = DOCUMENTS / "images"
Section = tuple[Callable[[Path], Data], Callable[[Data], Figure]]
SECTIONS: Mapping[str, Section] = {
    "chain": (experiments.chain, plots.chain),
    "rates": (experiments.rates, plots.rates),
    "gradient": (experiments.gradient, plots.gradient),
    "delta": (experiments.delta, plots.delta),
    "mean": (experiments.mean, plots.mean),
    "translation": (experiments.translation, plots.translation),
    "digits": (experiments.digits, plots.digits),
    "before": (jobs.before, plots.before),
    "whitening": (experiments.whitening, plots.whitening),
    "synchronizing": (jobs.synchronizing, plots.synchronizing),
}
TABLES: Mapping[str, Callable[[Data], str]] = {
    "chain": experiments.chain_table,
    "before": jobs.before_table,
    "whitening": experiments.whitening_table,
    "synchronizing": jobs.synchronizing_table,
}


def main() -> None:
    """Compute and draw the sections that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m scripts.chapter", description=__doc__)
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs/why"), help="default: %(default)s"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--write", action="store_true", help="put pictures and tables into docs/ too"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw, from the data that a run before has left"
    )
    arguments = parser.parse_args()
    places = [arguments.directory, *([IMAGES] if arguments.write else [])]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=place).close()
        except OSError as error:
            sys.exit(
                f"scripts.chapter: cannot write to {place}: {error.strerror}; "
                "name another directory"
            )
    torch.set_num_threads(1)  # the layers are too small to share
    for name in arguments.only:
        started = time.monotonic()
        print(f"{name} …", end=" ", flush=True)
        compute, draw = SECTIONS[name]
        file = arguments.directory / f"{name}.json"
        if not arguments.draw:
            file.write_text(json.dumps(compute(arguments.directory), indent=1))
        elif not file.exists():
            sys.exit(f"scripts.chapter: there is no {file} to draw; leave out --draw")
        data = json.loads(file.read_text())
        picture = arguments.directory / f"why-{name}.png"
        with mpl.rc_context(plots.STYLE):
            draw(data).savefig(picture)
        if arguments.write:
            shutil.copy(picture, IMAGES)
            if name in TABLES:
                write_table("why.md", f"scripts.chapter {name}", TABLES[name](data))
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    print(f"data and pictures are in {arguments.directory}")


if __name__ == "__main__":
    main()
