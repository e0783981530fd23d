"""Whole commands: from a command to its first step, and the jobs of a sweep."""

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

TIMEOUT_S = 300
JOBS = 3
TRAIN = str(REPOSITORY / "scripts" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def bench_starts(turns: int) -> Rows:
    """From a command to the first step of 2 ranks, or to the words about what is wrong in it."""
    times: dict[str, list[float]] = {"by hand": [], "ours": [], "error": []}
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as directory:
            file, run_dir = Path(directory) / "by_hand", Path(directory) / "run"
            by_hand = [*TORCHRUN, "-m", "scripts.bench.train.by_hand", str(file)]
            times["by hand"].append(_run(by_hand, file))
            ours = [sys.executable, TRAIN, "launch.nproc=2", "max_steps=1", "log_every_steps=1"]
            times["ours"].append(_run([*ours, f"run_dir={run_dir}"], run_dir / "steps.jsonl"))
            times["error"].append(_run([*ours, "optim.lr=high"], exit_code=2))
        progress({"turn": turn, **{name: taken[-1] for name, taken in times.items()}})
    taken = {name: statistics.median(each) for name, each in times.items()}
    row: dict[str, Any] = {f"{name} s": time_s for name, time_s in taken.items()}
    return [{"W": 2, **row, "ratio": taken["ours"] / taken["by hand"]}]


def bench_sweeps(turns: int) -> Rows:
    """A sweep of short jobs of 2 ranks, beside torchrun for one such job after the other."""
    beyond: dict[str, list[float]] = {"torchrun": [], "ours": []}
    trained: list[float] = []
    job = ["max_steps=2"]
    for turn in range(turns):
        for name, taken in beyond.items():
            with tempfile.TemporaryDirectory() as directory:
                if name == "ours":
                    seeds = f"seed={','.join(map(str, range(JOBS)))}"
                    command = [sys.executable, TRAIN, "-m", "launch.nproc=2", *job, seeds]
                    whole_s = _run([*command, f"sweep_dir={directory}/sweep"])
                else:
                    command = [*TORCHRUN, TRAIN, *job]
                    whole_s = sum(
                        _run([*command, f"seed={seed}", f"run_dir={directory}/{seed}"])
                        for seed in range(JOBS)
                    )
                results = [json.loads(f.read_text()) for f in Path(directory).rglob("result.json")]
            assert len(results) == JOBS
            trained_s = sum(result["duration_s"] for result in results)
            trained.append(trained_s / JOBS)
            taken.append((whole_s - trained_s) / JOBS)
        progress({"turn": turn, **{name: taken[-1] for name, taken in beyond.items()}})
    taken = {name: statistics.median(each) for name, each in beyond.items()}
    row: dict[str, Any] = {f"{name} s": time_s for name, time_s in taken.items()}
    row |= {"ratio": taken["ours"] / taken["torchrun"], "training s": statistics.median(trained)}
    return [{"W": 2, "jobs": JOBS, **row}]


def _run(command: list[str], until: Path | None = None, exit_code: int = 0) -> float:
    """Run a command to its end; return the seconds until it has written a file, or else to its end.

    The start by hand may end in any way after its step, as torch.distributed sometimes does.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        reached_s = taken_s = 0.0
        while process.poll() is None and taken_s < TIMEOUT_S:
            time.sleep(2e-3)
            taken_s = time.perf_counter() - start
            if until and not reached_s and until.exists() and until.stat().st_size:
                reached_s = taken_s
        process.kill()
        code = process.wait()
        if not (reached_s if until else code == exit_code):
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with {code}:\n{output.read()}")
    return reached_s or taken_s
