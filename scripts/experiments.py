"""No script: the experiments of why.py that train on several ranks.

Each job is one that `syncbn-train` would run, with the same files left behind; but the ranks of one
job go on to the next, which spares their start.
"""

import itertools
import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from chapter import mean_and_error
from torch.multiprocessing.spawn import spawn

from syncbn.train.config import compose_config
from syncbn.train.loop import train
from syncbn.train.run_directory import open_run_directory
from syncbn.train.sweep import job_name

Data = dict[str, Any]
RUNS = 4  # of each job, with other seeds
T_95 = 3.182  # Student's t for 95 % and as many runs
BATCHES = [2, 4, 8, 16]
NORMS = ("local", "sync")
KINDS = ["none", "penalty", "renormalize", "local", "sync", "whitening"]


class _NobodyWatches:
    """Stands in for the watch of a rank, which these have no launcher for."""

    stop_signal = 0

    def at(self, step: int, doing: str) -> None:
        """Tell nobody."""


def _be_rank(rank: int, world_size: int, directory: str, jobs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("syncbn").setLevel(logging.ERROR)
    store = f"file://{directory}/rendezvous-{world_size}"
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    for job in jobs:
        config = compose_config([*job, f"run_dir='{directory}/{job_name(job)}'", "track=none"])
        run = open_run_directory(config) if rank == 0 else None
        watch: Any = _NobodyWatches()
        result = train(config, run, torch.device("cpu"), watch)
        if run is not None:
            run.write_result(result)
            print(".", end="", flush=True)
    dist.destroy_process_group()


def _train(directory: Path, world_size: int, jobs: list[list[str]]) -> list[float]:
    """Return the test accuracy at the end of each job, all of which write what a sweep does."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (directory / job_name(job) / "result.json").exists()]
    if missing:
        (directory / f"rendezvous-{world_size}").unlink(missing_ok=True)
        spawn(_be_rank, (world_size, str(directory), missing), nprocs=world_size)
    ends: list[float] = []
    for job in jobs:
        *_, last = (directory / job_name(job) / "metrics.jsonl").read_text().splitlines()
        ends.append(json.loads(last)["test_accuracy"])
    return ends


def synchronising(directory: Path) -> Data:
    """Return accuracies with statistics of each rank and of all, for several batches and ranks."""
    rows: list[Data] = []
    for world_size, norms in ((1, ("sync",)), (2, NORMS), (4, NORMS)):
        shares = ("mixed",) if world_size == 1 else ("mixed", "by_class")
        keys = list(itertools.product(shares, BATCHES, norms))
        jobs = [
            [
                *(f"data.shares={share}", f"data.batch_size={size}", f"norm={norm}"),
                *(f"launch.nproc={world_size}", f"seed={seed}", "epochs=2"),
            ]
            for share, size, norm in keys
            for seed in range(RUNS)
        ]
        ends = _train(directory / "synchronising", world_size, jobs)
        for number, (share, size, norm) in enumerate(keys):
            row: Data = {"ranks": world_size, "shares": share, "batch": size, "norm": norm}
            rows.append(row | {"accuracies": ends[number * RUNS :][:RUNS]})
    found = {(r["shares"], r["ranks"], r["batch"], r["norm"]): r["accuracies"] for r in rows}
    gains: list[Data] = []
    for share, world_size, size in itertools.product(("mixed", "by_class"), (2, 4), BATCHES):
        local, sync = (found[share, world_size, size, norm] for norm in NORMS)
        gain, error = mean_and_error([b - a for a, b in zip(local, sync, strict=True)])
        row = {"shares": share, "ranks": world_size, "batch": size}
        gains.append(row | {"gain": gain, "95 %": T_95 * error})
    return {"rows": rows, "gains of sync over local": gains}


def before(directory: Path) -> Data:
    """Return what came before BN, BN and whitening, on a CNN and a deep perceptron."""
    models = {"cnn": ["model=cnn"], "mlp of 8 layers": ["model=mlp"]}
    models["mlp of 20 layers"] = ["model=mlp", "model.depth=20"]
    rows: list[Data] = []
    keys = list(itertools.product(models, KINDS))
    jobs = [
        [*models[model], f"norm={kind}", "launch.nproc=2", f"seed={seed}", "epochs=4"]
        for model, kind in keys
        for seed in range(RUNS)
    ]
    place = directory / "before"
    ends = _train(place, 2, jobs)
    for number, (model, kind) in enumerate(keys):
        row: Data = {"model": model, "norm": kind, "accuracies": ends[number * RUNS :][:RUNS]}
        if kind == "renormalize":
            lines = (place / job_name(jobs[number * RUNS]) / "steps.jsonl").read_text()
            row["steps"] = [json.loads(line) for line in lines.splitlines()]
        rows.append(row)
    return {"rows": rows}
