"""What is measured: one restart, many in a row, and the jobs of a sweep."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts import REPOSITORY
from scripts.bench.measure import Rows, progress
from scripts.bench.recovery.jobs import STARTERS, TIMEOUT_S, WORKLOADS, running

KILL_EVERY_S = 15.0
KILLS = 4
# Of a run that nobody kills, to know its pace: after the first ones, which are slower.
_FIRST_STEPS = 40
_PACE_S = 15.0
# Jobs of a sweep. The first has what the others find loaded.
JOBS = 8


def bench_restarts(turns: int) -> Rows:
    """From SIGKILL of one of two ranks to the next optimizer step, in seconds."""
    rows: Rows = []
    for workload, overrides in WORKLOADS.items():
        taken: dict[str, list[float]] = {starter: [] for starter in STARTERS}
        with tempfile.TemporaryDirectory() as directory:
            for starter in STARTERS:  # one after the other, as two jobs at once would share cores
                with running(starter, overrides, Path(directory) / starter) as job:
                    job.wait_for_steps(_FIRST_STEPS)
                    for turn in range(turns):
                        before = job.count_resumed()
                        killed = job.kill_a_rank(turn)
                        taken[starter].append(job.time_of_return(before) - killed)
                        time.sleep(1)
        row: dict[str, Any] = {"workload": workload}
        row |= {f"{starter} s": statistics.median(taken[starter]) for starter in STARTERS}
        row |= {"slowest of ours s": max(taken["ours"]), "ratio": row["ours s"] / row["torchrun s"]}
        rows.append(row)
        progress(row)
    return rows


def bench_goodput(turns: int) -> Rows:
    """The steps that a job makes while a rank is killed again and again, of those without."""
    rows: Rows = []
    for workload, overrides in WORKLOADS.items():
        shares: dict[str, list[float]] = {starter: [] for starter in STARTERS}
        for _ in range(turns):
            for starter in STARTERS:
                with tempfile.TemporaryDirectory() as directory:
                    share = _goodput(starter, overrides, Path(directory) / "job")
                shares[starter].append(share)
        row: dict[str, Any] = {"workload": workload}
        row |= {f"{starter} %": 100 * statistics.median(shares[starter]) for starter in STARTERS}
        rows.append(row)
        progress(row)
    return rows


def _goodput(starter: str, overrides: list[str], directory: Path) -> float:
    with running(starter, overrides, directory) as job:
        job.wait_for_steps(_FIRST_STEPS)
        first = len(job.steps())
        began = time.time()
        time.sleep(_PACE_S)
        steps = job.steps()
        pace = (len(steps) - first) / (steps[-1]["time"] - began)
        first, began = len(steps), steps[-1]["time"]
        for kill in range(KILLS):
            time.sleep(max(0.0, began + (kill + 0.5) * KILL_EVERY_S - time.time()))
            job.kill_a_rank(kill)
        time.sleep(max(0.0, began + KILLS * KILL_EVERY_S - time.time()))
        return (len(job.steps()) - first) / (time.time() - began) / pace


def bench_sweeps(turns: int) -> Rows:
    """What each job of a sweep takes beyond its training, and what the whole takes before."""
    beyond: list[float] = []
    trained: list[float] = []
    first: list[float] = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as directory:
            seeds = f"seed={','.join(map(str, range(JOBS)))}"
            command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "-m", seeds]
            command += ["launch.nproc=2", "max_steps=2", f"sweep_dir={directory}/sweep"]
            began = time.time()
            subprocess.run(
                command, cwd=REPOSITORY, check=True, capture_output=True, timeout=TIMEOUT_S
            )
            files = Path(directory).rglob("result.json")
            results = [json.loads(file.read_text()) for file in files]
        results.sort(key=lambda result: result["ended"])
        assert len(results) == JOBS
        first.append(results[0]["ended"] - results[0]["duration_s"] - began)
        for before, result in itertools.pairwise(results):
            beyond.append(result["ended"] - before["ended"] - result["duration_s"])
            trained.append(result["duration_s"])
    row = {
        "jobs": JOBS,
        "beyond training s": statistics.median(beyond),
        "training s": statistics.median(trained),
        "before the first s": statistics.median(first),
    }
    progress(row)
    return [row]
