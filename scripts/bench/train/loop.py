"""Epochs of the trainer, of a loop by hand, and of lightning, if it is installed."""

import importlib
import itertools
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] -- documented
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from scripts.bench.measure import Rows, progress
from scripts.bench.train.by_hand import BATCH_SIZE, LOG_EVERY, ByHand, sgd
from syncbn.models import build_model
from syncbn.train.launch.watchdog import Watch
from syncbn.train.run.checkpoint import checkpoint_files

# What the trainer is asked for; the rest are its defaults.
WORKLOADS = {
    "digits, cnn": ["data=digits", "model=cnn"],
    "32×32 pixels, ResNet-18": [
        *("data=synthetic", "data.test_samples=32"),
        *("model=custom", "model.factory=scripts.bench.train.models:resnet18"),
    ],
}
STEPS = 10  # of an epoch of 32×32 pixels
NO_LIGHTNING = "not installed: `pip install lightning`"


def _by_hand(
    model: nn.Module, dataset: TensorDataset, turns: int, fused: bool | None = None
) -> Callable[[], float]:
    """Return what trains one more epoch by hand and returns its seconds."""
    job, epochs = ByHand(model, dataset, turns, fused), itertools.count()

    def epoch() -> float:
        start = _together()
        job.train_epoch(next(epochs))
        return _together() - start

    return epoch


def _lightning(model: nn.Module, dataset: TensorDataset, turns: int) -> Callable[[], float] | None:
    """Return the same for lightning; None where it is not installed."""
    try:
        lightning: Any = importlib.import_module("lightning")
        environments: Any = importlib.import_module("lightning.fabric.plugins.environments")
    except ImportError:
        return None
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    times: list[float] = []

    class Module(lightning.LightningModule):  # pyright: ignore[reportUntypedBaseClass] -- may be absent
        def __init__(self) -> None:
            super().__init__()
            self.model = syncbn.convert_sync_batchnorm(model)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            steps = turns * math.ceil(len(loader) / dist.get_world_size())
            schedule = {"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            images, labels = batch
            loss = functional.cross_entropy(self.model(images), labels)
            self.log("loss", loss)
            return loss

        def on_train_epoch_start(self) -> None:
            times.append(_together())

        def on_train_epoch_end(self) -> None:
            times[-1] = _together() - times[-1]

    trainer: Any = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        plugins=[environments.TorchElasticEnvironment()],
        max_epochs=0,
        log_every_n_steps=LOG_EVERY,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()

    def epoch() -> float:
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, loader)
        return times[-1]

    return epoch


def _together() -> float:
    """Return the time at which the slowest rank is here."""
    dist.barrier()
    return time.perf_counter()


LOOPS: dict[str, Callable[[nn.Module, TensorDataset, int], Callable[[], float] | None]] = {
    "by hand": _by_hand,
    "fused by hand": partial(_by_hand, fused=True),
    "lightning": _lightning,
}


class _Turns(Watch):
    """Hears where the trainer is, times its epochs, and lets the others train one before or after.

    An epoch of ours lasts from its first batch to its checkpoint, as nothing is evaluated without
    validation data. A checkpoint that is still being
    written when the next begins is waited for, so that nobody's epoch pays for it.

    Args:
        others: each trains an epoch and returns its seconds.
        checkpoints: where the trainer writes them; None where it writes none.
    """

    def __init__(self, others: Mapping[str, Callable[[], float]], checkpoints: Path | None) -> None:
        store = TCPStore("localhost", 0, is_master=True)  # of its own: nobody will ask for it
        super().__init__(store, dist.get_rank(), dist.get_world_size(), 120, 30)
        self._others = others
        self._checkpoints = checkpoints
        self._began = 0.0
        self.times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}

    def at(self, step: int, doing: str) -> None:
        """Note that this rank moves; collective where an epoch begins or ends."""
        super().at(step, doing)
        even = len(self.times["ours"]) % 2 == 0
        if doing == "loading data" and not self._began:
            while step and self._checkpoints and not _is_written(self._checkpoints, step):
                time.sleep(0.01)
            if even:
                self._let(list(self._others))
            self._began = _together()
        elif doing == "writing a checkpoint" and self._began:
            self.times["ours"].append(_together() - self._began)
            self._began = 0.0
            if not even:
                self._let(list(self._others)[::-1])

    def _let(self, names: list[str]) -> None:
        for name in names:
            self.times[name].append(self._others[name]())


def _is_written(checkpoints: Path, step: int) -> bool:
    files = checkpoint_files(checkpoints)
    return len(files) <= 2 and bool(files) and files[0].stem == f"step-{step:09d}"


def bench_loops(turns: int) -> Rows:
    """Epochs of this trainer, of a loop by hand, and of lightning: same data, model and layer."""
    from syncbn.train.config import compose_config
    from syncbn.train.data.datasets import load_dataset
    from syncbn.train.loop import train
    from syncbn.train.run.directory import open_run_directory
    from syncbn.train.setup import describe_architecture
    from syncbn.train.tasks import make_task

    size = dist.get_world_size()
    rows: Rows = []
    for workload, asked in WORKLOADS.items():
        epochs = turns + 1  # the first is not counted
        samples = [f"data.samples={BATCH_SIZE * STEPS * size}"] if "32" in workload else []
        with tempfile.TemporaryDirectory() as directory:
            run_dir = f"run_dir={directory}/run"
            batches = f"data.batch_size={BATCH_SIZE}"
            same = [f"epochs={epochs}", "optim.decay_all=true", "data.validation=0"]  # as by hand
            config = compose_config([*asked, *samples, *same, batches, run_dir])
            data = load_dataset(config.data, config.seed)
            keys = [(0, index) for index in range(len(data.train))]
            images, labels = data.train.__getitems__(keys)
            dataset = TensorDataset(data.preprocessing.apply(images), labels)
            model = describe_architecture(config, make_task(config, data))
            others = {
                name: make(
                    build_model(model.name, model.arguments, allow_imports=True), dataset, epochs
                )
                for name, make in LOOPS.items()
            }
            run = open_run_directory(config) if dist.get_rank() == 0 else None
            present = {name: epoch for name, epoch in others.items() if epoch}
            watch = _Turns(present, run and run.checkpoints_dir)
            watch.start()
            train(config, run, torch.device("cpu"), watch)
            watch.end()
        row: dict[str, Any] = {"W": size, "workload": workload}
        times = {name: each[1:] for name, each in watch.times.items()}
        for name in ("by hand", "ours", *list(LOOPS)[1:]):
            row[f"{name} images/s"] = (
                len(dataset) / statistics.median(times[name]) if name in times else NO_LIGHTNING
            )
        for name in ("ours", *list(LOOPS)[1:]):
            pairs = zip(times.get(name, []), times["by hand"], strict=False)
            ratios = [time_s / by_hand_s for time_s, by_hand_s in pairs]
            row[f"{name} ratio"] = statistics.median(ratios) if ratios else "not installed"
        rows.append(row)
        progress(row)
    return rows
