"""Measure the service beside LitServe, BentoML, MLServer and plain FastAPI, on loopback.

python -m scripts.bench.serve --peers DIR      prints the tables; DIR gets the peers' environments
python -m scripts.bench.serve --only tiny      one of the models: tiny or resnet18
python -m scripts.bench.serve --json FILE      also writes the figures
python -m scripts.bench.serve --write          also puts the tables into docs/performance.md

All serve the same bundle, with one worker and one torch thread or two. Each server is started once
and stands still (SIGSTOP) but for its slices of a round; a figure is the median over the rounds.
Each connection sends one image, again as soon as it is answered, and every answer is checked. Ours
runs as its users run it, with keys, metrics and logs. The peers' settings are in peers.py, their
programs in programs.py. A batch of 16 images without a server is measured in the same rounds: as
the service computes it, with what torch has to make it fast, and as a bundle does without either.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from scripts import REPOSITORY
from scripts.bench.measure import machine, measured_on
from scripts.bench.serve.figures import Plan, measure
from scripts.bench.serve.peers import NAMES, PEERS
from scripts.bench.serve.processes import no_process_left
from scripts.bench.serve.report import as_json, report
from scripts.bench.serve.servers import CannotServeError, install
from scripts.bench.serve.wires import ENCODINGS
from scripts.bench.serve.workloads import WORKLOADS
from scripts.dev.document import write_table


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        default=REPOSITORY / "build" / "peers",
        help="where the peers' environments of Python are; missing ones are made with pip "
        "(5 GB each with CUDA's libraries, which pip adds to torch; default: build/peers)",
    )
    parser.add_argument("--only", choices=list(WORKLOADS), help="one model instead of both")
    parser.add_argument("--servers", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=ENCODINGS)
    parser.add_argument(
        "--connections", nargs="+", type=int, metavar="N", default=[1, 8, 32], help="at a time"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", default=[1, 2], help="of torch"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn")
    parser.add_argument("--seconds", type=float, default=2, help="how long a turn is counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    missing: dict[str, str] = {}
    settings: list[str] = []
    for key in [key for key in arguments.servers if key in PEERS]:
        peer = PEERS[key]
        try:
            settings.append(f"- {peer.name} {install(key, arguments.peers)}: {peer.settings}.")
        except CannotServeError as error:
            missing[key] = str(error)
            settings.append(f"- {peer.name}: not measured; it {' '.join(str(error).split())}")
    plan = Plan(
        [key for key in arguments.servers if key not in missing],
        arguments.encodings,
        arguments.connections,
        arguments.rounds,
        arguments.seconds,
        arguments.peers.absolute(),
    )
    everything: dict[str, Any] = {"machine": machine(), "settings": settings}
    print(*(f"{key}: {value}" for key, value in everything["machine"].items()), sep="\n")
    print(*settings, sep="\n")
    for model in [arguments.only] if arguments.only else list(WORKLOADS):
        with no_process_left():
            measured = [measure(model, threads, plan) for threads in arguments.threads]
        busy = max(part for figures in measured for part in figures.busy)
        on = measured_on(everything["machine"], arguments.rounds).replace("turns", "rounds")
        on = f"{on} Between the rounds, others used up to {busy:.0%} of the machine."
        text = f"{report(measured, plan)}\n\n{on}"
        print(f"\n## {model}: {WORKLOADS[model].title}\n\n{text}", flush=True)
        everything[model] = [as_json(figures) for figures in measured]
        if arguments.write:
            write_table("performance.md", f"scripts.bench.serve {model}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
