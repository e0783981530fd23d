"""The training loop: what every rank does between joining the process group and leaving it."""

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.reducer import select_reducer
from syncbn.errors import ConfigError, TrainingError
from syncbn.train.agreement import gathered, together
from syncbn.train.data import Batch
from syncbn.train.data.datasets import load_dataset
from syncbn.train.data.sampling import Loader, TrainingShare, held_out_batches, make_loader
from syncbn.train.device import compute_deterministically
from syncbn.train.evaluation import Evaluation, evaluate
from syncbn.train.export import export
from syncbn.train.journal import Journal
from syncbn.train.judge import Judge, is_good
from syncbn.train.launch.watchdog import Watch
from syncbn.train.plan import Plan
from syncbn.train.resume import resume
from syncbn.train.run.checkpoint import Checkpoint, Position
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.writer import Records
from syncbn.train.schema import Shares, TrainConfig
from syncbn.train.setup import Training, prepare
from syncbn.train.state import Sums
from syncbn.train.step import Step, Stepper
from syncbn.train.tasks import make_task
from syncbn.train.totals import DeviceTotals, HostTotals

log = logging.getLogger(__name__)

_HELD_OUT_BATCH_SIZE = 64


def train(
    config: TrainConfig, run: RunDirectory | None, device: torch.device, watch: Watch
) -> Result:
    """Train the configured model over all ranks of the default process group.

    Communicates each step, besides DDP and the layers: one all-reduce of 3 + S float64, S being the
    numbers that the task observes, by which all ranks know the loss, and whether to go on; on GPUs
    mostly one step late, see `step.py`.

    Args:
        config: the job, the same on every rank.
        run: where rank 0 writes; None on the other ranks.
        device: where this rank computes.
        watch: hears what this rank does, and of signals.

    Returns:
        How it ended: finished or interrupted, on every rank.

    Raises:
        ConfigError: the data or the model cannot be had as configured, on every rank.
        TrainingError: a loss or a gradient is not finite any more, or a file cannot be written or
            read, on every rank.
        DataError: a sample cannot be read, on this rank alone.
    """
    if config.numerics.deterministic:
        compute_deterministically()
    loop = _Loop(config, run, device, watch)
    try:
        return loop.train()
    finally:
        for loader in loop.loaders:
            loader.close()


class _Loop:
    def __init__(
        self, config: TrainConfig, run: RunDirectory | None, device: torch.device, watch: Watch
    ) -> None:
        self.config = config
        self.run = run
        self.device = device
        self.watch = watch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        watch.at(0, "loading data")
        self.dataset = together(lambda: load_dataset(config.data, config.seed))
        self.task = together(lambda: make_task(config, self.dataset))
        if config.patience is not None and self.dataset.validation is None:
            raise ConfigError(
                f"patience={config.patience} needs validation data, by which epochs are compared; "
                "set data.validation=0.1, or patience=null"
            )
        self.control = select_reducer(None, torch.device("cpu"))
        self.share = TrainingShare(
            len(self.dataset.train),
            config.data.batch_size,
            self.rank,
            self.world_size,
            config.seed,
            together(self._labels),
        )
        self.loaders: list[Loader] = []
        self.loader = self._load(self.dataset.train, self.share)
        self.plan = Plan(config, len(self.dataset.train), self.world_size)
        watch.at(0, "making the model")
        self.training: Training = together(
            lambda: prepare(
                config,
                self.task,
                self.dataset,
                device,
                self.plan.total_steps,
                self.plan.steps_per_epoch,
            )
        )
        self.validation = self._load_held_out(self.dataset.validation)
        self.records = Records(run, config.checkpoint.keep, device)
        self.journal = Journal(config, run, self.records, self.task, self.plan)

    def _labels(self) -> Tensor | None:
        """Return the labels by which the ranks share the training samples, if they do."""
        if self.config.data.shares is Shares.mixed:
            return None
        labels = getattr(self.dataset.train, "labels", None)
        if not isinstance(labels, Tensor):
            raise ConfigError(
                f"data.shares=by_class needs the labels of all samples in memory, which data="
                f"{self.config.data.name} has not; choose data.shares=mixed"
            )
        return labels

    def _load(self, samples: Any, batches: Iterable[Any]) -> Loader:
        pinned = self.device.type == "cuda"
        loader = make_loader(samples, batches, self.config.data.workers, pinned)
        self.loaders.append(loader)
        return loader

    def _load_held_out(self, samples: Any) -> Loader | None:
        if samples is None:
            return None
        size = len(samples), _HELD_OUT_BATCH_SIZE, self.rank, self.world_size
        return self._load(samples, held_out_batches(*size))

    def train(self) -> Result:
        started = time.monotonic()
        self.state = resume(self.run, self.training, self.plan, "", self.rank)
        judge = Judge(
            self.config,
            self.training,
            self.state,
            self.records,
            lambda: self._checkpoint(is_best=False),
            self.plan.samples,
        )
        totals = (
            HostTotals(self.control)
            if self.device.type == "cpu"
            else DeviceTotals(self.device, self.config.launch.timeout_s, self.task.statistics)
        )
        self.stepper = Stepper(self.training, totals, self.control, self.records, self.watch, judge)
        with self.journal.showing(self.state.position):
            while self._goes_on():
                stopped = self._train_epoch() or self._end_epoch()
                if stopped:
                    return self._stop(stopped, started)
        self.records.finish()
        self.watch.at(self.state.position.step, "exporting")
        self.share.set_position(0)
        batches = self._load(self.dataset.train, self.share)
        exported = export(
            self.training,
            self.run,
            self.dataset,
            self.state.best,
            self._until_told(self._watched(batches, "recalibrating")),
            self._evaluate_finally,
            self._told,
        )
        if exported is None:
            return self._stop(self._told(), started)
        self.journal.finish(is_whole=True)
        return Result(
            "finished",
            None,
            exported.metrics,
            time.monotonic() - started,
            0,
            [record.model_dump() for record in exported.evaluations],
            self._objective(),
        )

    def _objective(self) -> float:
        """Return what a sweep minimizes: an error of the best epoch, on data that it chose by."""
        name = next(n for n in self._names() if n in self.state.best)
        value = self.state.best[name]
        return 1 - value if self.task.maximize else value

    def _names(self) -> Iterator[str]:
        """Yield where the metric by which epochs are compared is, from best to worst."""
        for prefix in ("ema_val_", "val_", "train_"):
            yield f"{prefix}{self.task.best}"

    def _goes_on(self) -> bool:
        """Return whether there is a step to make, or the end of an epoch has not been noted."""
        position, patience = self.state.position, self.config.patience
        if position.samples > 0:
            return True
        best = self.state.best.get("epoch", 0)
        if patience is not None and position.epoch - best >= patience:
            log.info("no epoch was better than epoch %d for %d epochs", best, patience)
            return False
        return position.step < self.plan.total_steps

    def _stop(self, number: int, started: float) -> Result:
        """Write the state, and return how the run was stopped."""
        self._checkpoint(is_best=False)
        self.records.finish()
        self.journal.finish(is_whole=False)
        name = signal.Signals(number).name
        error = f"stopped by {name} after step {self.state.position.step}"
        log.info("%s; the same command with this run_dir goes on", error)
        duration_s = time.monotonic() - started
        return Result("interrupted", error, self.state.best, duration_s, 128 + number)

    def _train_epoch(self) -> int:
        """Do the rest of an epoch; return the number of the signal that stopped it, or 0."""
        epoch, samples = self.state.position.epoch, self.state.position.samples
        self.share.set_position(epoch, samples)
        self.training.replica.train()
        self.journal.begin_epoch()
        batches = iter(self.loader)
        number = 0
        while self.state.position.step < self.plan.total_steps and samples < self.plan.samples:
            before = self.state.position
            self.watch.at(before.step, "loading data")
            micro = list(itertools.islice(batches, self.config.optim.accumulate))
            total = sum(self.share.total(number + k) for k in range(len(micro)))
            number += len(micro)
            samples += total
            after = Position(epoch, samples, before.step + 1)
            step = self.stepper.make(micro, total, before, after)
            self.state.position = after
            stop = self._note(step)
            every = self.config.checkpoint.every_steps
            is_due = every is not None and after.step % every == 0 and samples < self.plan.samples
            if stop or is_due:
                stop = self._note(self.stepper.finish()) or stop
            if stop:
                return stop
            if is_due:
                self._checkpoint(is_best=False)
        return self._note(self.stepper.finish())

    def _note(self, step: Step | None) -> int:
        """Add a step to the epoch's sums, show and write it; return a signal to stop, or 0."""
        if step is None:  # it is not known yet, or has been noted
            return 0
        self.state.sums.add(step)
        self.journal.note(step)
        return self._told() if step.totals.stop_signals else 0

    def _told(self) -> int:
        """Return the highest number of a signal to stop that a rank was told, or 0."""
        return max(gathered(self.watch.stop_signal))

    def _watched(self, batches: Iterable[Batch], doing: str) -> Iterator[Batch]:
        """Yield batches, and note with each that this rank moves."""
        for batch in batches:
            self.watch.at(self.state.position.step, doing)
            yield batch
        self.watch.at(self.state.position.step, "waiting for the other ranks")

    def _until_told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, at least one, until this rank is told to stop."""
        for batch in batches:
            yield batch
            if self.watch.stop_signal:
                return

    def _evaluate(self, model: nn.Module, loader: Loader, keep_rows: bool) -> Evaluation | None:
        self.watch.at(self.state.position.step, "evaluating")
        batches = self._watched(loader, "evaluating")
        return evaluate(self.training, model, batches, self.control, self.watch, keep_rows)

    def _evaluate_finally(self, model: nn.Module, samples: Any) -> Evaluation | None:
        loader = self._load_held_out(samples)
        assert loader is not None
        return self._evaluate(model, loader, keep_rows=True)

    def _end_epoch(self) -> int:
        """Evaluate, write the epoch's metrics and state; return a signal to stop, or 0."""
        state, training = self.state, self.training
        epoch = state.position.epoch + 1
        metrics: dict[str, float] = {
            "epoch": epoch,
            "step": state.position.step,
            "lr": training.schedule.made[0],
            "skipped_steps": state.sums.skipped,
        }
        own = state.sums.metrics(self.task)
        metrics |= {f"train_{name}": value for name, value in own.items()}
        speed = self.journal.images_per_s()
        if self.validation is not None:
            models = {"val_": training.model}
            if training.average is not None:
                models["ema_val_"] = training.exported
            for prefix, model in models.items():
                found = self._evaluate(model, self.validation, keep_rows=False)
                if found is None:
                    return self._told()
                metrics |= {f"{prefix}{name}": value for name, value in found.metrics.items()}
        metrics["images_per_s"] = speed
        self._check(metrics, epoch)
        is_best = self.validation is None or self._quality(metrics) > self._quality(state.best)
        metrics["best"] = float(is_best)
        state.metrics = metrics
        if is_best:
            state.best = metrics
        state.sums = Sums(skipped_in_a_row=state.sums.skipped_in_a_row)
        state.position = Position(epoch, 0, state.position.step)
        self.journal.end_epoch(metrics)
        self._checkpoint(is_best)
        return 0

    def _check(self, metrics: dict[str, float], epoch: int) -> None:
        """Raise if a loss or a weight is not finite, before it is written."""
        losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
        wrong = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not is_good(self.training.model):
            wrong.append("a weight is not finite")
        if wrong:
            raise TrainingError(
                f"{', '.join(wrong)} after epoch {epoch}, step {self.state.position.step}; try a "
                f"lower optim.lr than {self.config.optim.lr:g}, or optim.clip_norm=1"
            )

    def _quality(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Return what the best epoch has the most of: the task's metric, and then a low loss."""
        prefix = "ema_val_" if self.training.average is not None else "val_"
        value = metrics.get(f"{prefix}{self.task.best}", math.nan)
        if math.isnan(value):
            return -math.inf, -math.inf
        return value if self.task.maximize else -value, -metrics[f"{prefix}loss"]

    def _checkpoint(self, is_best: bool) -> None:
        """Write the present state, in the background; collective: gathers the generators."""
        state = self.state
        self.watch.at(state.position.step, "writing a checkpoint")

        def make(generators: list[dict[str, Any]]) -> Checkpoint:
            return Checkpoint(
                state.position,
                self.world_size,
                state.metrics,
                state.best,
                state.sums.to_list(),
                self.training.state_dicts(),
                generators,
                "",
            )

        self.records.write_checkpoint(make, is_best)
