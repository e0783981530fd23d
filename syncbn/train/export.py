"""What comes out of a run: the best model as a bundle, how good it is, and pictures."""

import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from syncbn.bundle import Estimate, read_manifest, write_bundle
from syncbn.bundle import Evaluation as Record
from syncbn.errors import BundleError
from syncbn.train.agreement import from_rank_0, together
from syncbn.train.data import Batch, Dataset
from syncbn.train.data.sampling import Samples
from syncbn.train.description import describe
from syncbn.train.evaluation import Evaluation
from syncbn.train.interval import intervals
from syncbn.train.parameters import is_frozen
from syncbn.train.run.checkpoint import BEST, read_checkpoint
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.plots import plot_curves
from syncbn.train.run.publish import publish
from syncbn.train.run.status import Phase, Reporter
from syncbn.train.schema import CustomModelConfig, LocalNormConfig
from syncbn.train.setup import Training
from syncbn.transforms.recalibrate import recalibrate

log = logging.getLogger(__name__)

Statistics = Literal["as trained", "recalibrated"]


@dataclass(frozen=True)
class Exported:
    """What is known of the model that was exported.

    Attributes:
        metrics: those of its epoch, and of the test data, or else the validation data.
        evaluations: how good it is on these, as it was trained and after recalibration, with
            intervals; on rank 0 alone.
    """

    metrics: dict[str, float]
    evaluations: list[Record]


def export(
    training: Training,
    run: RunDirectory | None,
    dataset: Dataset,
    best: dict[str, float],
    batches: Callable[[], Iterable[Batch]],
    evaluate: Callable[[nn.Module, Samples], Evaluation | None],
    told: Callable[[], int],
    reporter: Reporter,
) -> Exported | None:
    """Write the bundle of the best epoch and the curves, and say how good it is.

    Collective: the best model's state is broadcast from rank 0, and, with `recalibrate`, what that
    function sends.

    Args:
        training: whose model is exported, with the state of the best epoch.
        run: where rank 0 writes; None on the other ranks.
        dataset: whose test samples are looked at now, and at no other time.
        best: the metrics of the best epoch.
        batches: returns this rank's share of the training samples, which ends early if it is told
            to stop.
        evaluate: returns what a model makes of samples, or None if a rank is told to stop.
        told: returns whether a rank was told to stop, on all ranks.
        reporter: tells what is done.

    Returns:
        None if a rank was told to stop before all was known; nothing was written then.

    Raises:
        TrainingError: the best epoch's checkpoint cannot be read, on every rank; or the bundle
            cannot be published, on rank 0 alone, and the run directory is complete then.
    """
    model = training.exported
    name = "model" if training.average is None else "average"

    def read() -> Any:
        return None if run is None else read_checkpoint(run.checkpoints_dir / BEST).states[name]

    trained = training.model if training.average is None else training.average
    trained.load_state_dict(from_rank_0(together(read)))
    if dataset.validation is None:
        log.info("no validation data tell which epoch is the best: the last one is exported")
    split, samples = _held_out(dataset)
    found: list[tuple[Statistics, Evaluation]] = []
    if samples is not None:
        as_trained = evaluate(model, samples)
        if as_trained is None:
            return None
        found.append(("as trained", as_trained))
    if training.config.recalibrate and isinstance(training.config.norm, LocalNormConfig):

        def forward(model: nn.Module, batch: Any) -> None:
            with training.autocast():
                model(training.inputs(batch[0]))

        if told():
            return None
        with reporter.during(Phase.RECALIBRATING):
            layers = recalibrate(
                model, batches(), forward=forward, only=lambda _, layer: not is_frozen(layer)
            )
        if told():
            return None
        log.info("recalibrated the statistics of %d layers", len(layers))
        if samples is not None:
            recalibrated = evaluate(model, samples)
            if recalibrated is None:
                return None
            found.append(("recalibrated", recalibrated))
    metrics = dict(best)
    if split == "test":
        metrics |= {f"test_{name}": value for name, value in found[-1][1].metrics.items()}
    if run is None:
        return Exported(metrics, [])
    records = [_record(training, split, how, evaluation) for how, evaluation in found]
    for record in records:
        log.info("%s", _in_words(record, training.task.best))
    _write(training, run, dataset, metrics, records)
    # Last, so that the run directory is complete wherever this fails.
    if training.config.publish is not None:
        reporter.enter(Phase.PUBLISHING)
        publish(run.bundle_dir, Path(training.config.publish), training.config.name)
    return Exported(metrics, records)


def _held_out(dataset: Dataset) -> tuple[Literal["test", "validation"], Samples | None]:
    """Return the samples that tell how good a model is, and the name of their split."""
    if dataset.test is not None:
        return "test", dataset.test
    return "validation", dataset.validation


def _record(
    training: Training,
    split: Literal["test", "validation"],
    how: Statistics,
    evaluation: Evaluation,
) -> Record:
    """Return what is said of a model on a split, with intervals."""
    assert evaluation.rows is not None
    bounds = intervals(training.task, evaluation.rows)
    estimates: dict[str, Estimate] = {}
    for name, value in evaluation.metrics.items():
        if math.isfinite(value):
            low, high = bounds.get(name, (None, None))
            estimates[name] = Estimate(value=value, low=low, high=high)
    return Record(split=split, samples=evaluation.samples, statistics=how, metrics=estimates)


def _in_words(record: Record, name: str) -> str:
    estimate = record.metrics.get(name)
    if estimate is None:
        return f"{record.split}: no {name}"
    interval = "" if estimate.low is None else f" ({estimate.low:.4f} to {estimate.high:.4f})"
    return (
        f"{record.split} {name.replace('_', ' ')} {estimate.value:.4f}{interval} of "
        f"{record.samples} samples, statistics {record.statistics}"
    )


def _write(
    training: Training,
    run: RunDirectory,
    dataset: Dataset,
    metrics: dict[str, float],
    records: list[Record],
) -> None:
    """Write the bundle and the curves."""
    config = training.config
    for temporary in run.path.glob(f".{run.bundle_dir.name}.*"):  # an attempt was killed right here
        shutil.rmtree(temporary, ignore_errors=True)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    description = describe(config, training.task, training.architecture, dataset, finite, records)
    if run.bundle_dir.exists() and not _is_of(run.bundle_dir, description.config_sha256):
        shutil.rmtree(run.bundle_dir)  # of a run that was shorter then
    if not run.bundle_dir.exists():  # or an attempt before this one was stopped right here
        imports = isinstance(config.model, CustomModelConfig)
        write_bundle(run.bundle_dir, description, training.exported, allow_imports=imports)
    log.info("bundle written to %s", run.bundle_dir)
    try:
        plot_curves(run.path)
    except OSError as error:  # the model is safe, and that is what counts
        log.warning("no picture of the curves: %s", error)


def _is_of(bundle: Path, config_sha256: str) -> bool:
    try:
        return read_manifest(bundle).config_sha256 == config_sha256
    except BundleError:
        return False
