"""Time training: its step, its loop beside others, and what goes before the first step.

python -m scripts.bench.train                  prints the tables
python -m scripts.bench.train --section NAME   prints one: layers, loop, start or sweep
python -m scripts.bench.train --json FILE      also writes the figures
python -m scripts.bench.train --write          also puts the tables into docs/performance.md

What is compared takes turns within one run; a figure is the median over the turns. Ranks have one
thread each. layers: steps of a ResNet-18 of which only the normalization differs. loop: epochs of
this trainer, of a loop written by hand, and of lightning, where it is installed. start: from the
command to the first optimizer step. sweep: what a job of a sweep takes beyond its training.
"""

import argparse
import importlib
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
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
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn
from scripts import REPOSITORY
from scripts.bench.measure import Rows, machine, measured_on, on_ranks, progress, table, take_turns
from scripts.dev.document import write_table

# Hydra, torchvision and scikit-learn are loaded where they are needed: this file is also the script
# by hand whose start is timed.
from syncbn.models import build_model
from syncbn.train.checkpoint import checkpoint_files
from syncbn.train.watch import Watch

WIDTHS = [16, 64]
IMAGES = [8, 32]
# What the trainer is asked for; the rest are its defaults.
WORKLOADS = {
    "digits, cnn": ["data=digits", "model=cnn"],
    "32×32 pixels, ResNet-18": [
        *("data=synthetic", "data.test_samples=32"),
        *("model=custom", "model.factory=scripts.bench.train:resnet18"),
    ],
}
BATCH_SIZE = 16
STEPS = 10  # of an epoch of 32×32 pixels
LOG_EVERY = 10
TIMEOUT_S = 300
NO_LIGHTNING = "not installed: `pip install lightning`"
JOBS = 3
TRAIN = str(REPOSITORY / "scripts" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *args: Any)
        total = vector.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _Naive(nn.BatchNorm2d):
    """What one writes in ten minutes: E[x²] − E[x]², and autograd through an all-reduce."""

    def forward(self, input: Tensor) -> Tensor:
        moments = torch.cat([input.mean((0, 2, 3)), input.square().mean((0, 2, 3))])
        total: Tensor = _Sum.apply(moments)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
        mean, square = (total / dist.get_world_size()).chunk(2)
        variance = square - mean.square()
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(variance, 0.1)
        scale = (variance + self.eps).rsqrt() * self.weight
        column = (1, -1, 1, 1)
        return (input - mean.view(column)) * scale.view(column) + self.bias.view(column)


def resnet18(
    width: int = 64,
    norm: type[nn.Module] = nn.BatchNorm2d,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return a ResNet-18 for images of 32×32 pixels, whose first stage has `width` channels."""
    from torchvision.models.resnet import BasicBlock

    def block(channels: int, out_channels: int, stride: int) -> nn.Module:
        downsample = None
        if stride != 1 or channels != out_channels:
            convolution = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            downsample = nn.Sequential(convolution, norm(out_channels))
        return BasicBlock(channels, out_channels, stride, downsample, norm_layer=norm)  # pyright: ignore[reportArgumentType] -- a class is such a function

    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    for stage, (channels, out_channels) in enumerate(itertools.pairwise(widths)):
        blocks += [
            block(channels, out_channels, 2 if stage else 1),
            block(out_channels, out_channels, 1),
        ]
    return nn.Sequential(
        *(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm(width)),
        nn.ReLU(inplace=True),
        *(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes)),
    )


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()

    return step


def bench_steps(turns: int) -> Rows:
    """Training steps of each width and number of images."""
    rows: Rows = []
    for width, number in itertools.product(WIDTHS, IMAGES):
        images, labels = torch.randn(number, 3, 32, 32), torch.randint(10, (number,))
        models = {
            "nn.BatchNorm2d": resnet18(width, nn.BatchNorm2d),
            "SyncBatchNorm": resnet18(width, syncbn.SyncBatchNorm),
            "fused": syncbn.fuse(resnet18(width, syncbn.SyncBatchNorm)).model,
            "naive": resnet18(width, _Naive),
        }
        taken = take_turns({n: _step(model, images, labels) for n, model in models.items()}, turns)
        row: dict[str, Any] = {"W": dist.get_world_size(), "width": width, "images": number}
        row |= {f"{name} ms": time_s * 1e3 for name, time_s in taken.items()}
        plain_s = taken.pop("nn.BatchNorm2d")
        rows.append(row | {f"{name} ratio": time_s / plain_s for name, time_s in taken.items()})
        progress(rows[-1])
    return rows


class ByHand:
    """The loop that one writes by hand, with everything as torch has it by default.

    Args:
        fused: not by default, but as the trainer has it: an optimizer that passes once over memory.
    """

    def __init__(
        self, model: nn.Module, dataset: TensorDataset, epochs: int, fused: bool | None = None
    ) -> None:
        self.sampler: DistributedSampler[Any] = DistributedSampler(dataset)
        self.loader = DataLoader(dataset, BATCH_SIZE, sampler=self.sampler)
        self.model = DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
        self.optimizer = _sgd(self.model, fused)
        self.schedule = CosineAnnealingLR(self.optimizer, epochs * len(self.loader))
        self.losses: list[float] = []

    def train_epoch(self, epoch: int) -> None:
        """Train on this rank's share of the samples, in a new order each epoch."""
        self.sampler.set_epoch(epoch)
        self.model.train()
        for step, (images, labels) in enumerate(self.loader):
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            if step % LOG_EVERY == 0:
                self.losses.append(loss.item())


def _sgd(model: nn.Module, fused: bool | None = None) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )


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
            optimizer = _sgd(self)
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

    An epoch of ours lasts from its first batch to its evaluation. A checkpoint that is still being
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
        elif doing == "evaluating" and self._began:
            self.times["ours"].append(_together() - self._began)
            self._began = 0.0
            if not even:
                self._let(list(self._others)[::-1])

    def _let(self, names: list[str]) -> None:
        with torch.inference_mode(False):  # an evaluation is in that mode
            for name in names:
                self.times[name].append(self._others[name]())


def _is_written(checkpoints: Path, step: int) -> bool:
    files = checkpoint_files(checkpoints)
    return len(files) <= 2 and bool(files) and files[0].stem == f"step-{step:09d}"


def bench_loops(turns: int) -> Rows:
    """Epochs of this trainer, of a loop by hand, and of lightning: same data, model and layer."""
    from syncbn.train.config import compose_config
    from syncbn.train.data import load_dataset
    from syncbn.train.loop import train
    from syncbn.train.run_directory import open_run_directory
    from syncbn.train.state import describe_architecture

    size = dist.get_world_size()
    rows: Rows = []
    for workload, asked in WORKLOADS.items():
        epochs = turns + 1  # the first is not counted
        samples = [f"data.samples={BATCH_SIZE * STEPS * size}"] if "32" in workload else []
        with tempfile.TemporaryDirectory() as directory:
            run_dir = f"run_dir={directory}/run"
            batches = f"data.batch_size={BATCH_SIZE}"
            config = compose_config([*asked, *samples, batches, f"epochs={epochs}", run_dir])
            data = load_dataset(config.data, config.seed)
            keys = [(0, index) for index in range(len(data.train))]
            images, labels = data.train.__getitems__(keys)
            dataset = TensorDataset(data.preprocessing.apply(images), labels)
            model = describe_architecture(config, data)
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


def be_by_hand(file: Path) -> None:
    """Be a rank of the job by hand, and write a file after its first step."""
    from sklearn.datasets import load_digits

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    one_step = BATCH_SIZE * dist.get_world_size()
    dataset = TensorDataset(images[:one_step], torch.tensor(labels[:one_step]))
    ByHand(build_model("cnn", {"in_channels": 1, "num_classes": 10}), dataset, 1).train_epoch(0)
    if dist.get_rank() == 0:
        file.write_text("a step\n")
    dist.destroy_process_group()


def bench_starts(turns: int) -> Rows:
    """From a command to the first step of 2 ranks, or to the words about what is wrong in it."""
    times: dict[str, list[float]] = {"by hand": [], "ours": [], "error": []}
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as directory:
            file, run_dir = Path(directory) / "by_hand", Path(directory) / "run"
            by_hand = [*TORCHRUN, "-m", "scripts.bench.train", "--by-hand", str(file)]
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


# What each section does, in worlds of which sizes, if in any but this process, and how many turns.
SECTIONS: dict[str, tuple[Callable[[int], Rows], list[int], int]] = {
    "layers": (bench_steps, [1, 2], 15),
    "loop": (bench_loops, [1, 2], 15),
    "start": (bench_starts, [], 5),
    "sweep": (bench_sweeps, [], 3),
}


def run_section(name: str, turns: int) -> Rows:
    """Measure a section, in worlds of its own processes where it has any."""
    section, world_sizes, _ = SECTIONS[name]
    if not world_sizes:
        return section(turns)
    return [row for world_size in world_sizes for row in on_ranks(world_size, section, turns)]


def summary(name: str, rows: Rows) -> str:
    """Return a sentence about a section's bars."""
    if name == "layers":
        worst = {
            name: max(row[f"{name} ratio"] for row in rows if row["W"] == 2)
            for name in ("SyncBatchNorm", "fused")
        }
        return "Ratios are over nn.BatchNorm2d; the bar at W = 2 is 1.0. The worst: " + (
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items()) + "."
        )
    if name == "loop":
        worst_loop = max(row["ours ratio"] for row in rows)
        return (
            "Ratios are medians of an epoch's time over that by hand in the same turn. The bar for "
            f"ours is 1.02; the worst is {worst_loop:.3f}. By hand, DDP broadcasts buffers before "
            "each step, as it does by default."
        )
    if name == "start":
        return (
            "To the first optimizer step; error: to the end of a command with optim.lr=high, for "
            "which the bar is 2 s."
        )
    return (
        "Seconds of each job beyond its training, which is what result.json calls duration_s: "
        "the first steps, an evaluation, a checkpoint and the bundle."
    )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", choices=list(SECTIONS), help="one section instead of all")
    parser.add_argument("--turns", type=int, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    parser.add_argument("--by-hand", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.by_hand:
        be_by_hand(arguments.by_hand)
        return
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    for name in [arguments.section] if arguments.section else list(SECTIONS):
        turns = arguments.turns or SECTIONS[name][2]
        rows = figures[name] = run_section(name, turns)
        measured = measured_on(figures["machine"], turns)
        text = f"{table(rows)}\n\n{summary(name, rows)}\n\n{measured}"
        print(f"\n## {name}\n\n{text}")
        if arguments.write:
            write_table("performance.md", f"scripts.bench.train {name}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
