"""The training loop: what every rank does between joining the process group and leaving it."""

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from syncbn.comm.reducer import select_reducer
from syncbn.errors import ConfigError, TrainingError
from syncbn.train.agreement import gathered, together
from syncbn.train.data import Batch, Samples
from syncbn.train.device import compute_deterministically
from syncbn.train.evaluation import Evaluation, evaluate
from syncbn.train.export import export
from syncbn.train.feed import Feed
from syncbn.train.journal import Journal
from syncbn.train.judge import Judge, is_good
from syncbn.train.launch.watchdog import Watch
from syncbn.train.plan import Plan
from syncbn.train.resume import resume
from syncbn.train.run.attempts import report_attempt
from syncbn.train.run.checkpoint import Checkpoint, Position
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.reasons import FINISHED, NOT_FINITE, STOPPED
from syncbn.train.run.status import Phase, Reporter
from syncbn.train.run.writer import Records
from syncbn.train.schema import TrainConfig
from syncbn.train.selection import objective, quality
from syncbn.train.setup import Training, prepare
from syncbn.train.state import Sums
from syncbn.train.step import Step, Stepper
from syncbn.train.tasks import make_task
from syncbn.train.totals import DeviceTotals, HostTotals
from syncbn.train.trial import try_out

log = logging.getLogger(__name__)


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
    with report_attempt(None if run is None else run.path, config.epochs) as reporter:
        feed = Feed(config, dist.get_rank(), dist.get_world_size(), device.type == "cuda", watch)
        try:
            return _Loop(config, run, device, watch, feed, reporter).train()
        finally:
            feed.close()


class _Loop:
    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory | None,
        device: torch.device,
        watch: Watch,
        feed: Feed,
        reporter: Reporter,
    ) -> None:
        self.config = config
        self.run = run
        self.device = device
        self.watch = watch
        self.feed = feed
        self.reporter = reporter
        self.rank = dist.get_rank()
        self.task = together(lambda: make_task(config, feed.dataset))
        if config.patience is not None and feed.validation is None:
            raise ConfigError(
                f"patience={config.patience} needs validation data, by which epochs are compared; "
                "set data.validation=0.1, or patience=null"
            )
        self.control = select_reducer(None, torch.device("cpu"))
        self.plan = Plan(config, feed.share, dist.get_world_size())
        watch.at(0, "making the model")
        self.training: Training = together(self._prepare)
        self.records = Records(run, config.checkpoint.keep, device)
        self.journal = Journal(config, run, self.records, self.task, self.plan, reporter)

    def _prepare(self) -> Training:
        plan, dataset = self.plan, self.feed.dataset
        steps = plan.total_steps, plan.steps_per_epoch
        training = prepare(self.config, self.task, dataset, self.device, *steps)
        try_out(training, dataset, self.feed.share.last_batch(), self.rank)
        return training

    def train(self) -> Result:
        started = time.monotonic()
        self.state = resume(self.run, self.training, self.plan, self.feed.sha256, self.rank)
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
                    self.reporter.enter(Phase.STOPPING)
                    self._check({})
                    self._checkpoint(is_best=False)
                    self.records.finish()
                    return self._stop(stopped, started)
        self.records.finish()
        return self._export(started)

    def _goes_on(self) -> bool:
        """Return whether there is a step to make, or the end of an epoch has not been noted."""
        position, patience = self.state.position, self.config.patience
        if position.samples > 0:
            return True
        best = int(self.state.best.get("epoch", 0))
        if patience is not None and position.epoch - best >= patience:
            log.info("no epoch was better than epoch %d for %d epochs", best, patience)
            return False
        return position.step < self.plan.total_steps

    def _train_epoch(self) -> int:
        """Do the rest of an epoch; return the number of the signal that stopped it, or 0."""
        share, every = self.feed.share, self.config.checkpoint.every_steps
        epoch, samples = self.state.position.epoch, self.state.position.samples
        share.set_position(epoch, samples)
        self.training.replica.train()
        self.journal.begin_epoch()
        batches = iter(self.feed.training)
        number = 0
        while self.state.position.step < self.plan.total_steps and samples < share.size_of_epoch:
            before = self.state.position
            self.watch.at(before.step, "loading data")
            micro = list(itertools.islice(batches, self.config.optim.accumulate))
            total = sum(share.total(number + k) for k in range(len(micro)))
            number += len(micro)
            samples += total
            after = Position(epoch, samples, before.step + 1)
            step = self.stepper.make(micro, total, before, after)
            self.state.position = after
            stop = self._note(step)
            is_due = every is not None and after.step % every == 0 and samples < share.size_of_epoch
            if stop or is_due:
                stop = self._note(self.stepper.finish()) or stop
            if stop:
                return stop
            if is_due:
                self._check({})
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

    def _evaluate(
        self, model: nn.Module, batches: Iterable[Batch], keep_rows: bool
    ) -> Evaluation | None:
        watched = self.watch.moving(batches, self.state.position.step, "evaluating")
        with self.reporter.during(Phase.EVALUATING):
            return evaluate(self.training, model, watched, self.control, self.watch, keep_rows)

    def _end_epoch(self) -> int:
        """Evaluate, write the epoch's metrics and state; return a signal to stop, or 0."""
        state = self.state
        epoch = state.position.epoch + 1
        metrics: dict[str, float] = {
            "epoch": epoch,
            "step": state.position.step,
            "lr": self.training.schedule.made[0],
            "skipped_steps": state.sums.skipped,
        }
        own = state.sums.metrics(self.task)
        metrics |= {f"train_{name}": value for name, value in own.items()}
        speed = self.journal.images_per_s()
        for prefix, model in self._judged().items():
            assert self.feed.validation is not None
            found = self._evaluate(model, self.feed.validation, keep_rows=False)
            if found is None:
                return self._told()
            metrics |= {f"{prefix}{name}": value for name, value in found.metrics.items()}
        metrics["images_per_s"] = speed
        self._check(metrics)
        is_best = not self._judged() or quality(metrics, self.task) > quality(state.best, self.task)
        metrics["best"] = float(is_best)
        state.metrics = metrics
        if is_best:
            state.best = metrics
        state.sums = Sums(skipped_in_a_row=state.sums.skipped_in_a_row)
        state.position = Position(epoch, 0, state.position.step)
        self.journal.end_epoch(metrics)
        self._checkpoint(is_best)
        return 0

    def _judged(self) -> dict[str, nn.Module]:
        """Return the models that are evaluated after each epoch, by what their metrics begin."""
        if self.feed.validation is None:
            return {}
        models = {"val_": self.training.model}
        if self.training.average is not None:
            models["ema_val_"] = self.training.exported
        return models

    def _check(self, metrics: dict[str, float]) -> None:
        """Raise if a loss or a weight is not finite, before it is written."""
        position = self.state.position
        losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
        wrong = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not is_good(self.training.model):
            wrong.append("a weight is not finite")
        if wrong:
            raise TrainingError(
                f"{', '.join(wrong)} after step {position.step}, in epoch {position.epoch + 1}; "
                f"try a lower optim.lr than {self.config.optim.lr:g}, or optim.clip_norm=1"
            ).because(NOT_FINITE)

    def _checkpoint(self, is_best: bool) -> None:
        """Write the present state, in the background; collective: gathers the generators."""
        state = self.state
        self.watch.at(state.position.step, "writing a checkpoint")

        def make(generators: list[dict[str, Any]]) -> Checkpoint:
            return Checkpoint(
                state.position,
                dist.get_world_size(),
                state.metrics,
                state.best,
                state.sums.to_list(),
                self.training.state_dicts(),
                generators,
                self.feed.sha256,
            )

        self.records.write_checkpoint(make, is_best)

    def _stop(self, number: int, started: float) -> Result:
        """Return how the run was stopped, of which the state is written."""
        self.journal.finish(is_whole=False)
        name = signal.Signals(number).name
        error = f"stopped by {name} after step {self.state.position.step}"
        log.info("%s; the same command with this run_dir goes on", error)
        return Result(
            "interrupted",
            error,
            self.state.best,
            time.monotonic() - started,
            128 + number,
            reason=STOPPED,
        )

    def _export(self, started: float) -> Result:
        """Write what comes out of the run, and return how it ended."""
        feed, step = self.feed, self.state.position.step
        self.watch.at(step, "exporting")
        self.reporter.enter(Phase.EXPORTING)

        def evaluate_once(model: nn.Module, samples: Samples) -> Evaluation | None:
            return self._evaluate(model, feed.held_out(samples), keep_rows=True)

        def batches() -> Iterable[Batch]:
            moving = self.watch.moving(feed.once_more(), step, "recalibrating")
            return feed.until_told(moving)

        best = self.state.best
        exported = export(
            self.training,
            self.run,
            feed.dataset,
            best,
            batches,
            evaluate_once,
            self._told,
            self.reporter,
        )
        if exported is None:  # what the model holds now is the best epoch's, and not to be written
            return self._stop(self._told(), started)
        self.journal.finish(is_whole=True)
        evaluations = [record.model_dump() for record in exported.evaluations]
        return Result(
            "finished",
            None,
            exported.metrics,
            time.monotonic() - started,
            0,
            evaluations,
            objective(best, self.task),
            reason=FINISHED,
        )
