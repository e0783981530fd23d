"""Run the service of training jobs under many small jobs, and kill it meanwhile.

python -m scripts.bench.jobs                   prints the tables
python -m scripts.bench.jobs --jobs N          so many jobs of one step each; default: 2000
python -m scripts.bench.jobs --kills N         times that something is killed at most; default: 50
python -m scripts.bench.jobs --json FILE       also writes the figures
python -m scripts.bench.jobs --write           also puts the tables into docs/reliability.md

A service and a dispatcher run as their users run them, by themselves, and are started again when
they end. First, clients submit jobs to a service that nobody kills. Then jobs go to an idle
dispatcher, one after the other. Then all clients submit their jobs at once, while the service, the
dispatcher or both are killed with SIGKILL every few seconds, at the latest until half of the jobs
have ended. Of the second half, memory and open files are measured. In the end, each job must have
finished exactly once, by the store and by what its processes wrote.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench.jobs.measure import measure_many, measure_starts, measure_submissions
from scripts.bench.jobs.processes import running
from scripts.bench.measure import Rows, machine, table
from scripts.bench.serve.processes import no_process_left
from scripts.dev.document import write_table
from syncbn.jobs.store.store import Store


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return all figures, and under "wrong" what is not as it must be."""
    rate = measure_submissions(
        directory / "submissions", min(arguments.jobs, 1000), arguments.clients
    )
    place = directory / "many"
    place.mkdir()
    try:
        with running(place, arguments.slots) as platform:
            starts = measure_starts(platform, arguments.starts)
            others = _known(platform.jobs)
            seconds, usage, outcome = measure_many(
                platform,
                arguments.jobs,
                arguments.clients,
                others,
                kill_every_s=arguments.kill_every,
                kills=arguments.kills,
            )
    except BaseException:
        for log in place.glob("*.log"):
            print(f"{log.name}:\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise
    return {
        "rate": rate,
        "starts": starts,
        "seconds": seconds,
        "usage": usage,
        "attempts": dict(outcome.attempts),
        "states": dict(outcome.states),
        "finished once": outcome.finished_once,
        "wrong": outcome.wrong,
    }


def _known(jobs: Path) -> set[str]:
    store = Store(jobs)
    try:
        return {job.id for job in store.select(limit=500).jobs}
    finally:
        store.close()


def tables(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return the figures in markdown."""
    seconds, starts, jobs = figures["seconds"], figures["starts"], arguments.jobs
    all_jobs = sum(figures["states"].values())
    seen: list[tuple[str, float | str, str]] = [
        ("submissions a second", figures["rate"], "above 100"),
        ("seconds from submission to running", starts["running"], "below 1"),
        (f"seconds to list the first of {jobs} jobs", seconds["list"], "below 0.3"),
        ("seconds to the page itself", seconds["page"], "below 0.3"),
        ("seconds to the end of a job that runs alone", starts["ended"], ""),
        (f"seconds a job of {jobs}", seconds["whole"] / jobs, ""),
        ("kills", str(seconds["kills"]), ""),
        ("jobs that finished exactly once", str(figures["finished once"]), f"all {all_jobs}"),
    ]
    rows: Rows = [{"": name, "seen": value, "goal": goal} for name, value, goal in seen]
    begun = ", ".join(
        f"{count} in {attempts}" for attempts, count in sorted(figures["attempts"].items())
    )
    return "\n\n".join(
        [table(rows), table(figures["usage"]), f"Jobs by the number of attempts begun: {begun}."]
    )


def main() -> None:
    """Measure, print, and write what was asked for; exit with 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=2000, help="how many are submitted at once")
    parser.add_argument("--clients", type=int, default=8, help="how many submit them")
    parser.add_argument("--slots", type=int, default=4, help="how many run at a time")
    parser.add_argument("--starts", type=int, default=20, help="how many are started alone")
    parser.add_argument(
        "--kill-every", type=float, default=10, metavar="SECONDS", help="from kill to kill, about"
    )
    parser.add_argument("--kills", type=int, default=50, help="at most so many times; 0: never")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    found = machine()
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    # What jobs are left outlive the dispatcher.
    with (
        tempfile.TemporaryDirectory(prefix="syncbn-bench-") as directory,
        no_process_left(),
    ):
        figures = measure(arguments, Path(directory))
    options = f"--jobs {arguments.jobs} --slots {arguments.slots}"
    measured = (
        f"Measured on: {found['processor']}, {found['cores']} cores, torch "
        f"{found['torch'].partition('+')[0]}, {found['date']}, `{options} "
        f"--kill-every {arguments.kill_every:g} --kills {arguments.kills}`."
    )
    text = f"{tables(figures, arguments)}\n\n{measured}"
    print(f"\n{text}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": found, **figures}, indent=2) + "\n")
    if arguments.write:
        write_table("reliability.md", "scripts.bench.jobs", text)
    if figures["wrong"]:
        sys.exit("\n".join(["", "wrong:", *figures["wrong"]]))


if __name__ == "__main__":
    main()
