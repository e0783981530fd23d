"""The training loop: what every rank does between joining the process group and leaving it."""

import itertools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from syncbn.comm.reducer import select_reducer
from syncbn.errors import ConfigError, SyncBNError, TrainingError
from syncbn.train.data.datasets import load_dataset
from syncbn.train.data.sampling import Batch, TrainingShare, held_out_batches, make_loader
from syncbn.train.device import compute_deterministically
from syncbn.train.evaluation import evaluate
from syncbn.train.export import export
from syncbn.train.generators import restore_generators, seed_generators
from syncbn.train.launch.watchdog import Watch
from syncbn.train.run.checkpoint import Checkpoint, Position, read_newest
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.tracking import NoTracker, Tracker, start_tracker
from syncbn.train.run.writer import Records
from syncbn.train.schema import Shares, TrainConfig
from syncbn.train.setup import Training, prepare
from syncbn.train.step import Step, Stepper
from syncbn.train.totals import DeviceTotals, HostTotals

log = logging.getLogger(__name__)

T = TypeVar("T")
_TEST_BATCH_SIZE = 64


def train(
    config: TrainConfig, run: RunDirectory | None, device: torch.device, watch: Watch
) -> Result:
    """Train the configured model over all ranks of the default process group.

    Communicates each step, besides DDP and the layers: one all-reduce of 4 float64, by which all
    ranks know the loss, and whether to go on; on GPUs mostly one step late, see `step.py`.

    Args:
        config: the job, the same on every rank.
        run: where rank 0 writes; None on the other ranks.
        device: where this rank computes.
        watch: hears what this rank does, and of signals.

    Returns:
        How it ended: finished or interrupted, on every rank.

    Raises:
        ConfigError: the data or the model cannot be had as configured, on every rank.
        TrainingError: a loss is not finite any more, or a file cannot be written or read, on every
            rank.
        DataError: a sample cannot be read, on this rank alone.
    """
    if config.numerics.deterministic:
        compute_deterministically()
    loop = _Loop(config, run, device, watch)
    try:
        return loop.train()
    finally:
        loop.loader.close()
        loop.test_loader.close()


class _Loop:
    def __init__(
        self, config: TrainConfig, run: RunDirectory | None, device: torch.device, watch: Watch
    ) -> None:
        self.config = config
        self.run = run
        self.watch = watch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dataset = together(lambda: load_dataset(config.data, config.seed))
        self.control = select_reducer(None, torch.device("cpu"))
        self.share = TrainingShare(
            len(self.dataset.train),
            config.data.batch_size,
            self.rank,
            self.world_size,
            config.seed,
            together(self._labels),
        )
        pinned = device.type == "cuda"
        self.loader = make_loader(self.dataset.train, self.share, config.data.workers, pinned)
        held_out = held_out_batches(
            len(self.dataset.test), _TEST_BATCH_SIZE, self.rank, self.world_size
        )
        self.test_loader = make_loader(self.dataset.test, held_out, config.data.workers, pinned)
        self.steps_per_epoch = self._steps_from(0)
        self.total_steps = self._capped(config.epochs * self.steps_per_epoch)
        watch.at(0, "making the model")
        self.training: Training = together(
            lambda: prepare(config, self.dataset, device, self.total_steps, self.steps_per_epoch)
        )
        self.position = Position()
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.sums = [0.0, 0.0, 0.0]
        self.records = Records(run, config.checkpoint.keep, device)
        totals = (
            HostTotals(self.control)
            if device.type == "cpu"
            else DeviceTotals(device, config.launch.timeout_s)
        )
        self.stepper = Stepper(self.training, totals, self.records, watch, self._judge)

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

    def train(self) -> Result:
        started = time.monotonic()
        self._resume()
        tracker = NoTracker() if self.run is None else start_tracker(self.config, self.run)
        images = len(self.dataset.train)
        silent = self.run is None or not sys.stderr.isatty()
        with (
            tqdm(
                total=round(images * self.total_steps / self.steps_per_epoch),
                initial=self.position.epoch * images + self.position.samples,
                unit=" images",
                disable=silent,
                dynamic_ncols=True,
                smoothing=0.1,
            ) as progress,
            logging_redirect_tqdm([logging.getLogger("syncbn")] if not silent else []),
        ):
            while self.position.step < self.total_steps:
                stopped = self._train_epoch(tracker, progress)
                if stopped:
                    self._checkpoint(is_best=False)
                    self.records.finish()
                    tracker.finish(None)
                    name = signal.Signals(stopped).name
                    error = f"stopped by {name} after step {self.position.step}"
                    log.info("%s; the same command with this run_dir goes on", error)
                    duration_s = time.monotonic() - started
                    return Result("interrupted", error, self.best, duration_s, 128 + stopped)
                self._end_epoch(tracker)
        self.records.finish()
        self.watch.at(self.position.step, "exporting")
        metrics = export(
            self.training, self.run, self.dataset, self.share, self.best, self._evaluate
        )
        tracker.finish(None if self.run is None else self.run.bundle_dir)
        return Result("finished", None, metrics, time.monotonic() - started, 0)

    def _resume(self) -> None:
        """Go to where the newest checkpoint was taken, if there is one."""
        found: list[Checkpoint | None] = [None]

        def read() -> None:
            if self.run is not None:
                found[0] = read_newest(self.run.checkpoints_dir)

        together(read)
        dist.broadcast_object_list(found, src=0)
        checkpoint = found[0]
        if checkpoint is not None:
            self.position = checkpoint.position
            self.metrics, self.best = checkpoint.metrics, checkpoint.best
            self.sums = checkpoint.sums
            if checkpoint.world_size == self.world_size:
                self.training.restore(checkpoint)
                self._restore_generators(checkpoint.generators[self.rank])
            else:
                self._restore_elsewhere(checkpoint)
            log.info(
                "resuming in epoch %d after step %d", self.position.epoch + 1, self.position.step
            )
        if self.run is not None:
            self.run.forget_after(self.position.step)

    def _restore_generators(self, states: dict[str, Any]) -> None:
        """Return to a checkpoint's generators, and say where it has none for this device."""
        device = self.training.device
        seed_generators(self.config.seed, self.position)  # for those of which it has none
        restore_generators(states, device)
        was_on_gpu = "cuda" in states
        if was_on_gpu != (device.type == "cuda"):
            log.warning(
                "the run goes on on %s, and was on %s: random numbers within the model are others, "
                "and sums round otherwise",
                device.type,
                "cuda" if was_on_gpu else "cpu",
            )

    def _restore_elsewhere(self, checkpoint: Checkpoint) -> None:
        """Go on with another number of ranks, at the same share of the run and of its schedule."""
        if self.config.data.shares is Shares.by_class and self.position.samples:
            raise TrainingError(
                f"the run stopped within an epoch that {checkpoint.world_size} ranks share by "
                f"class, and {self.world_size} would share otherwise; go on with "
                f"{checkpoint.world_size} ranks"
            )
        left = self._steps_from(self.position.samples)
        whole = self.config.epochs - self.position.epoch - 1
        self.total_steps = self._capped(
            self.position.step + left + max(0, whole) * self.steps_per_epoch
        )
        done = self.position.epoch * self.steps_per_epoch + self.steps_per_epoch - left
        self.training.restore(checkpoint, min(done, self.total_steps))
        seed_generators(self.config.seed, self.position)
        log.warning(
            "%d ranks go on with what %d have trained: each epoch still sees every sample once, "
            "and the learning rate is the one for this share of the run, but batches have another "
            "size, random numbers within the model are others, and sums round otherwise",
            self.world_size,
            checkpoint.world_size,
        )

    def _train_epoch(self, tracker: Tracker, progress: "tqdm[Any]") -> int:
        """Do the rest of an epoch; return the number of the signal that stopped it, or 0."""
        epoch, samples = self.position.epoch, self.position.samples
        self.share.set_position(epoch, samples)
        self.training.replica.train()
        self.epoch_started = time.monotonic()
        self.epoch_images = 0
        self.logged = time.monotonic(), 0
        batches = iter(self.loader)
        number = 0
        while self.position.step < self.total_steps and samples < len(self.dataset.train):
            before = self.position
            self.watch.at(before.step, "loading data")
            micro = list(itertools.islice(batches, self.config.optim.accumulate))
            total = sum(self.share.total(number + k) for k in range(len(micro)))
            number += len(micro)
            samples += total
            after = Position(epoch, samples, before.step + 1)
            step = self.stepper.make(micro, total, before, after)
            self.position = after
            stop = self._note(step, tracker, progress)
            at_end = samples == len(self.dataset.train)
            every = self.config.checkpoint.every_steps
            is_due = every is not None and after.step % every == 0 and not at_end
            if stop or is_due:
                stop = self._note(self.stepper.finish(), tracker, progress) or stop
            if stop:
                return stop
            if is_due:
                self._checkpoint(is_best=False)
        return self._note(self.stepper.finish(), tracker, progress)

    def _note(self, step: Step | None, tracker: Tracker, progress: "tqdm[Any]") -> int:
        """Add a step to the epoch's sums, show and write it; return a signal to stop, or 0."""
        if step is None:  # it is not known yet, or has been noted
            return 0
        totals, samples = step.totals, step.samples
        loss, accuracy = totals.loss / samples, totals.correct / samples
        self.sums = [
            self.sums[0] + totals.loss,
            self.sums[1] + totals.correct,
            self.sums[2] + samples,
        ]
        self.epoch_images += samples
        progress.update(samples)
        if not progress.disable:
            progress.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)
        if step.after.step % self.config.log_every_steps == 0:
            now, (logged_at, logged_images) = time.monotonic(), self.logged
            images_per_s = (self.epoch_images - logged_images) / (now - logged_at)
            self.logged = now, self.epoch_images
            values = {
                "step": step.after.step,
                "epoch": step.after.epoch + step.after.samples / len(self.dataset.train),
                "lr": step.rate,
                "loss": loss,
                "accuracy": accuracy,
                "images_per_s": images_per_s,
                **step.extra,
            }
            self.records.write(lambda run: run.append_step(values))
            tracker.log(step.after.step, values)
        if totals.stop_signals:  # at least one rank was told to; all take the highest number
            return int(_maximum(self.watch.stop_signal))
        return 0

    def _judge(self, step: Step) -> None:
        """Raise, on every rank, where a step of which the totals are known must be the last."""
        if step.totals.failures:
            self.records.raise_failure()
        if not math.isfinite(step.totals.loss):
            self._give_up(step)

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        self.watch.at(self.position.step, "evaluating")
        return evaluate(self.training, model, self._watched(self.test_loader), self.control)

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and note with each that this rank moves."""
        for batch in batches:
            self.watch.at(self.position.step, "evaluating")
            yield batch
        self.watch.at(self.position.step, "waiting for the other ranks")

    def _end_epoch(self, tracker: Tracker) -> None:
        """Evaluate, write the epoch's metrics and state, and go to the next."""
        rate = float(self.training.schedule.get_last_lr()[0])
        elapsed_s = time.monotonic() - self.epoch_started
        loss, correct, count = self.sums
        epoch = self.position.epoch + 1
        metrics: dict[str, float] = {"epoch": epoch, "step": self.position.step, "lr": rate}
        metrics |= {"train_loss": loss / count, "train_accuracy": correct / count}
        metrics |= self._evaluate(self.training.model)
        if self.training.average is not None:
            averaged = self._evaluate(self.training.exported)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        metrics["images_per_s"] = self.epoch_images / max(elapsed_s, 1e-9)
        if not math.isfinite(metrics["test_loss"]):
            raise TrainingError(
                f"the test loss is {metrics['test_loss']} after epoch {epoch}, step "
                f"{self.position.step}; try a lower optim.lr than {self.config.optim.lr:g}, or "
                "optim.clip_norm=1"
            )
        self.metrics = metrics
        is_best = _quality(metrics) > _quality(self.best)
        if is_best:
            self.best = metrics
        self.sums = [0.0, 0.0, 0.0]
        self.position = Position(epoch, 0, self.position.step)
        self.records.write(lambda run: run.append_metrics(metrics))
        self._checkpoint(is_best)
        tracker.log(self.position.step, metrics)
        shown = self.config.epochs
        log.info(
            "epoch %*d/%d  train loss %.4f  test loss %.4f  accuracy %.2f %%  %.0f images/s%s",
            len(str(shown)),
            epoch,
            shown,
            metrics["train_loss"],
            metrics["test_loss"],
            100 * metrics["test_accuracy"],
            metrics["images_per_s"],
            "  (best)" if is_best else "",
        )

    def _checkpoint(self, is_best: bool) -> None:
        """Write the present state, in the background; collective: gathers the generators."""
        self.watch.at(self.position.step, "writing a checkpoint")

        def make(generators: list[dict[str, Any]]) -> Checkpoint:
            return Checkpoint(
                self.position,
                self.world_size,
                self.metrics,
                self.best,
                self.sums,
                self.training.state_dicts(),
                generators,
            )

        self.records.write_checkpoint(make, is_best)

    def _give_up(self, step: Step) -> None:
        """Write the state before a step whose loss is not finite, and raise what is known of it."""
        training = self.training
        position = self.position = step.before
        own: list[Any] = [None] * self.world_size
        dist.all_gather_object(own, math.isfinite(step.own_loss))
        where = [rank for rank, finite in enumerate(own) if not finite] or "only all ranks together"
        step.kept.restore()
        state = [*training.model.parameters(), *training.model.buffers()]
        good = all(bool(tensor.isfinite().all()) for tensor in state)
        if good:
            self._checkpoint(is_best=False)
            self.records.finish()
        kept_state = (
            f"the state before this step is in checkpoints/step-{position.step:09d}.ckpt"
            if good
            else "the weights were not finite before it, so only older checkpoints are good"
        )
        total = len(self.dataset.train)
        rate = training.schedule.get_last_lr()[0]
        raise TrainingError(
            f"the training loss is {step.totals.loss / step.samples} at step {position.step + 1} "
            f"(epoch {position.epoch + 1}, after {position.samples} of {total} samples, learning "
            f"rate {rate:g}, ranks {where}); {kept_state}; try a lower optim.lr than "
            f"{self.config.optim.lr:g}, or optim.clip_norm=1"
        )

    def _steps_from(self, samples: int) -> int:
        """Return the optimizer steps from a position in an epoch to its end."""
        per_step = self.config.data.batch_size * self.world_size * self.config.optim.accumulate
        return math.ceil((len(self.dataset.train) - samples) / per_step)

    def _capped(self, steps: int) -> int:
        limit = self.config.max_steps
        return steps if limit is None else min(steps, limit)


def together(work: Callable[[], T]) -> T:
    """Do something on every rank, and raise the first rank's error of ours on all of them.

    Collective: one all-gather of the errors' texts.
    """
    value: Any = None
    error: SyncBNError | None = None
    try:
        value = work()
    except SyncBNError as raised:
        error = raised
    errors: list[SyncBNError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each
    return value


def _quality(metrics: dict[str, float]) -> tuple[float, float]:
    """Return what the best epoch has the most of: accuracy, and then a low loss."""
    prefix = "ema_" if "ema_test_loss" in metrics else ""
    if not metrics:
        return -math.inf, -math.inf
    return metrics[f"{prefix}test_accuracy"], -metrics[f"{prefix}test_loss"]


def _maximum(value: float) -> float:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)
