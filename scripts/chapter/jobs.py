"""The experiments of the chapter that train on several ranks.

Each job is one that `syncbn-train` would run, with the same files left behind; but the ranks of one
job go on to the next, which spares their start.
"""

import itertools
import json
import logging
import statistics
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from scipy import stats
from torch.multiprocessing.spawn import spawn

from scripts.bench.measure import table
from scripts.chapter.digits import mean_and_error
from syncbn.errors import TrainingError
from syncbn.train.config import compose_config
from syncbn.train.launch.sweep import job_name
from syncbn.train.loop import train
from syncbn.train.run.directory import Result, open_run_directory
from syncbn.train.run.reasons import reason_of
from syncbn.train.schema import TrainConfig

Data = dict[str, Any]
T = TypeVar("T")
SEEDS = range(4)
BATCHES = [2, 4, 8, 16]
NORMS = ("local", "sync")
STATISTICS = ("running averages", "recalibrated")

SEEDS_BEFORE = range(2)
MODELS = ["cnn", "mlp"]
RATES = [0.01, 0.03, 0.1]
KINDS = ["none", "penalty", "renormalize", "local", "sync", "whitening"]
GUESSING = 0.1  # the accuracy that a job counts with whose loss became infinite
# As the published figures were measured: no epoch is chosen, so the last one is exported and
# tested, all training samples train, and weight decay is for all parameters.
MEASURED = ["data.validation=0", "optim.decay_all=true", "track=none"]


class _NobodyWatches:
    """Stands in for the watch of a rank, which these have no launcher for."""

    stop_signal = 0

    def at(self, step: int, doing: str) -> None:
        """Tell nobody."""

    def moving(self, parts: Iterable[T], step: int, doing: str) -> Iterable[T]:
        """Return the parts, and tell nobody."""
        return parts

    def working(self, step: int, doing: str) -> AbstractContextManager[None]:
        """Return a context of which nobody is told."""
        return nullcontext()


def _be_rank(rank: int, world_size: int, directory: str, configs: list[TrainConfig]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("syncbn").setLevel(logging.ERROR)
    store = f"file://{directory}/rendezvous-{world_size}"
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    for config in configs:
        run = open_run_directory(config) if rank == 0 else None
        watch: Any = _NobodyWatches()
        try:
            result = train(config, run, torch.device("cpu"), watch)
        except TrainingError as error:  # on every rank: the loss is not finite any more
            result = Result("failed", str(error), {}, 0.0, 1, reason=reason_of(error))
        if run is not None:
            run.write_result(result)
            print(".", end="", flush=True)
    dist.destroy_process_group()


def train_jobs(directory: Path, world_size: int, jobs: list[list[str]]) -> list[Path]:
    """Train each job over so many ranks, and return the directories of their runs."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    runs = [directory / job_name(job) for job in jobs]
    configs = [
        compose_config([*job, *MEASURED, f"run_dir='{run}'"])
        for job, run in zip(jobs, runs, strict=True)
    ]
    spawn(_be_rank, (world_size, str(directory), configs), nprocs=world_size)
    return runs


def _new(directory: Path, name: str) -> Path:
    """Return the name of a directory for the jobs of one experiment, which no other has used."""
    return directory / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def accuracy_at_end(run: Path, how: str = "as trained") -> float:
    """Return the test accuracy at the end of a job.

    Args:
        run: its directory.
        how: of which statistics: "as trained", by the running averages, or "recalibrated".
    """
    result = json.loads((run / "result.json").read_text())
    if result["status"] == "failed":
        return GUESSING
    (found,) = [each for each in result["evaluations"] if each["statistics"] == how]
    return found["metrics"]["accuracy"]["value"]


def synchronizing(directory: Path) -> Data:
    """Return accuracies with statistics of each rank and of all, for several batches and ranks.

    After one epoch, by the running averages (of rank 0, as DistributedDataParallel has it). Where
    ranks have classes of their own, also by the statistics of all training samples instead.
    """
    place, rows = _new(directory, "synchronizing"), list[Data]()
    for world_size, norms in ((1, ("sync",)), (2, NORMS), (4, NORMS)):
        shares = ("mixed",) if world_size == 1 else ("mixed", "by_class")
        keys = list(itertools.product(shares, BATCHES, norms))
        jobs = [
            [
                *(f"data.shares={share}", f"data.batch_size={size}", f"norm={norm}"),
                *(f"launch.nproc={world_size}", f"seed={seed}", "epochs=1"),
                f"recalibrate={str(share == 'by_class').lower()}",
            ]
            for share, size, norm in keys
            for seed in SEEDS
        ]
        runs = iter(train_jobs(place, world_size, jobs))
        for share, size, norm in keys:
            row: Data = {"ranks": world_size, "shares": share, "batch": size, "norm": norm}
            of_seeds = [next(runs) for _ in SEEDS]
            row["running averages"] = [accuracy_at_end(run) for run in of_seeds]
            if share == "by_class":
                row["recalibrated"] = [accuracy_at_end(run, "recalibrated") for run in of_seeds]
            rows.append(row)
    t_95 = float(stats.t.ppf(0.975, len(SEEDS) - 1))
    return {"rows": rows, "t": t_95, "gains of sync over local": _gains(rows, t_95)}


def _gains(rows: list[Data], t_95: float) -> list[Data]:
    """Return what sync gains over local in pairs of one seed: at each batch, and at all together.

    With 95 % intervals by Student's t over the seeds; of all batches, over the means of the seeds.
    """
    found = {(r["shares"], r["ranks"], r["batch"], r["norm"]): r for r in rows}
    gains: list[Data] = []
    for what, share, ranks in itertools.product(STATISTICS, ("mixed", "by_class"), (2, 4)):
        if what not in found[share, ranks, BATCHES[0], NORMS[0]]:
            continue
        pairs = [[found[share, ranks, size, norm][what] for norm in NORMS] for size in BATCHES]
        by_size = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
        together = [statistics.mean(of_seed) for of_seed in zip(*by_size, strict=True)]
        for size, values in [*zip(BATCHES, by_size, strict=True), ("all", together)]:
            gain, error = mean_and_error(values)
            row = {"statistics": what, "shares": share, "ranks": ranks, "batch": size}
            gains.append(row | {"gain": gain, "95 %": t_95 * error})
    return gains


def synchronizing_table(data: Data) -> str:
    """Return the gains of `synchronizing` in points; in bold, where 0 is outside the interval."""
    cells: dict[Any, Data] = {}
    for row in data["gains of sync over local"]:
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['95 %']:.1f}".replace("-", "−")
        line = cells.setdefault(row["batch"], {"batch of a rank": str(row["batch"])})
        again = ", recalibrated" if row["statistics"] == "recalibrated" else ""
        column = f"{row['ranks']} ranks, {row['shares'].replace('_', ' ')}{again}"
        line[column] = f"**{gain}**" if abs(row["gain"]) > row["95 %"] else gain
    return table(list(cells.values()))


def before(directory: Path) -> Data:
    """Return what came before BN, BN and whitening, on a CNN and a perceptron, over rates."""
    keys = list(itertools.product(MODELS, KINDS, RATES))
    jobs = [
        [
            *(f"model={model}", f"norm={kind}", f"optim.lr={rate}", "launch.nproc=2"),
            *(f"seed={seed}", "epochs=3", "log_every_steps=1"),
        ]
        for model, kind, rate in keys
        for seed in SEEDS_BEFORE
    ]
    # What renormalizing finds to undo where nothing is learned: each batch is another one.
    still = [
        [f"model={model}", "norm=renormalize", "optim.lr=1e-12", "launch.nproc=2", *jobs[0][-3:]]
        for model in MODELS
    ]
    runs = iter(train_jobs(_new(directory, "before"), 2, [*jobs, *still]))
    rows: list[Data] = []
    undone: list[Data] = []
    for model, kind, rate in keys:
        of_seeds = [next(runs) for _ in SEEDS_BEFORE]
        row: Data = {"model": model, "norm": kind, "lr": rate}
        rows.append(row | {"accuracies": [accuracy_at_end(run) for run in of_seeds]})
        if kind == "renormalize" and rate == RATES[-1]:
            undone.append({"model": model, "lr": rate, "ln σ": _undone(of_seeds[0])})
    for model, run in zip(MODELS, runs, strict=True):
        undone.append({"model": model, "lr": 0.0, "ln σ": _undone(run)})
    return {"rows": rows, "undone": undone}


def _undone(run: Path) -> list[float]:
    """Return the root mean square of ln σ over all units that renormalizing undid, by step."""
    lines = (run / "steps.jsonl").read_text().splitlines()
    return [json.loads(line)["undone_log_scale"] for line in lines]


def before_table(data: Data) -> str:
    """Return the accuracies of `before` in percent: the mean over the seeds."""
    cells: dict[str, Data] = {kind: {"norm": f"`{kind}`"} for kind in KINDS}
    for row in data["rows"]:
        text = f"{100 * statistics.mean(row['accuracies']):.1f}"
        cells[row["norm"]][f"{row['model']}, {row['lr']:g}"] = text
    return table(list(cells.values()))
