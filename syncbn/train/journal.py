"""What is shown and written of steps and epochs while they are made."""

import logging
import math
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from syncbn.train.plan import Plan
from syncbn.train.run.checkpoint import Position
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.status import Phase, Reporter
from syncbn.train.run.tracking import NoTracker, Tracker, start_tracker
from syncbn.train.run.writer import Records
from syncbn.train.schema import TrainConfig
from syncbn.train.step import Step
from syncbn.train.tasks import Task

log = logging.getLogger(__name__)


class Journal:
    """Shows progress on the terminal, and writes the lines of steps and epochs; on rank 0 alone.

    Args:
        config: the job.
        run: where rank 0 writes; None on the other ranks.
        records: writes lines.
        task: makes metrics of what was observed.
        plan: the steps of the run.
        reporter: tells how far the run is.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory | None,
        records: Records,
        task: Task,
        plan: Plan,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._run = run
        self._records = records
        self._task = task
        self._plan = plan
        self._reporter = reporter
        self._tracker: Tracker = NoTracker()
        self._silent = run is None or not sys.stderr.isatty()
        self._progress: tqdm[Any] | None = None

    @contextmanager
    def showing(self, position: Position) -> Generator[None]:
        """Track the run, and show progress from a position on, until the end of the context."""
        if self._run is not None:
            self._tracker = start_tracker(self._config, self._run)
        plan = self._plan
        self._reporter.begin(position.step, plan.total_steps, self._epoch(position))
        with (
            tqdm(
                total=round(plan.samples * plan.total_steps / plan.steps_per_epoch),
                initial=position.epoch * plan.samples + position.samples,
                unit=" images",
                disable=self._silent,
                dynamic_ncols=True,
                smoothing=0.1,
            ) as progress,
            logging_redirect_tqdm([] if self._silent else [logging.getLogger("syncbn")]),
        ):
            self._progress = progress
            yield

    def begin_epoch(self) -> None:
        """Begin to measure how fast an epoch, or the rest of it, is."""
        self._started = self._logged_at = time.monotonic()
        self._images = self._logged_images = 0
        self._reporter.enter(Phase.TRAINING)

    def images_per_s(self) -> float:
        """Return how many images a second were trained on, over all ranks, in this epoch."""
        return self._images / max(time.monotonic() - self._started, 1e-9)

    def _epoch(self, position: Position) -> float:
        """Return the passes over the data that are made, with the part of the present one."""
        return position.epoch + position.samples / self._plan.samples

    def note(self, step: Step) -> None:
        """Show a step, and write it if its turn has come."""
        self._images += step.samples
        epoch = self._epoch(step.after)
        self._reporter.note(step.after.step, epoch, self.images_per_s())
        statistics = self._task.metrics(step.totals.statistics)
        if self._progress is not None:
            self._progress.update(step.samples)
            best = self._task.best
            shown = {"loss": f"{step.loss:.4f}", best: f"{statistics[best]:.4f}"}
            self._progress.set_postfix(shown, refresh=False)
        number = step.after.step
        if number % self._config.log_every_steps == 0:
            now = time.monotonic()
            speed = (self._images - self._logged_images) / max(now - self._logged_at, 1e-9)
            self._logged_at, self._logged_images = now, self._images
            values = {
                "step": number,
                "epoch": epoch,
                "lr": step.rate,
                "loss": step.loss,
                # A step in which no pixel counts has none, and NaN is not JSON.
                **{key: value for key, value in statistics.items() if not math.isnan(value)},
                "images_per_s": speed,
                **step.extra,
            }
            line = {**values, "time": time.time()}
            self._records.write(lambda run: run.append_step(line))
            self._tracker.log(number, values)

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Write and show the metrics of an epoch."""
        line = {**metrics, "time": time.time()}
        self._records.write(lambda run: run.append_metrics(line))
        self._tracker.log(int(metrics["step"]), metrics)
        best = self._task.best
        parts = [f"train loss {metrics['train_loss']:.4f}"]
        for prefix, name in (("val_", "validation"), ("ema_val_", "of the average")):
            if f"{prefix}loss" in metrics:
                value = metrics[f"{prefix}{best}"]
                parts.append(f"{name} loss {metrics[f'{prefix}loss']:.4f}")
                parts.append(f"{best.replace('_', ' ')} {value:.4f}")
        if metrics["skipped_steps"]:
            parts.append(f"{metrics['skipped_steps']:.0f} steps skipped")
        shown = self._config.epochs
        log.info(
            "epoch %*d/%d  %s  %.0f images/s%s",
            len(str(shown)),
            metrics["epoch"],
            shown,
            "  ".join(parts),
            metrics["images_per_s"],
            "  (best)" if metrics["best"] and "val_loss" in metrics else "",
        )

    def finish(self, is_whole: bool) -> None:
        """End what tracks the run.

        Args:
            is_whole: whether the run has left a bundle.
        """
        bundle = self._run.bundle_dir if self._run is not None and is_whole else None
        self._tracker.finish(bundle)
