"""What comes out of a run: the best model as a bundle, and pictures of how it got there."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from syncbn.bundle import Description, write_bundle
from syncbn.train.config import config_sha256
from syncbn.train.data.datasets import Dataset
from syncbn.train.data.sampling import TrainingShare, make_loader
from syncbn.train.run.checkpoint import BEST, read_checkpoint
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.plots import plot_curves
from syncbn.train.run.publish import publish
from syncbn.train.schema import CustomModelConfig, LocalNormConfig
from syncbn.train.setup import Training
from syncbn.transforms.recalibrate import recalibrate

log = logging.getLogger(__name__)


def export(
    training: Training,
    run: RunDirectory | None,
    dataset: Dataset,
    share: TrainingShare,
    best: dict[str, float],
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> dict[str, float]:
    """Write the bundle of the best epoch and the curves; return the metrics of what is exported.

    Collective: the best model's state is broadcast from rank 0, and, with `recalibrate`, what that
    function sends.

    Raises:
        TrainingError: the bundle cannot be published, on rank 0 alone; the run directory is
            complete then.
    """
    model = training.exported
    name = "model" if training.average is None else "average"
    found: list[Any] = [None]
    if run is not None:
        found[0] = read_checkpoint(run.checkpoints_dir / BEST).states[name]
    dist.broadcast_object_list(found, src=0)
    (training.model if training.average is None else training.average).load_state_dict(found[0])
    metrics = dict(best)
    if training.config.recalibrate and isinstance(training.config.norm, LocalNormConfig):
        share.set_position(0)

        def forward(model: nn.Module, batch: Any) -> None:
            with training.autocast():
                model(training.inputs(batch[0]))

        pinned = training.device.type == "cuda"
        batches = make_loader(dataset.train, share, 0, pinned)
        layers = recalibrate(model, batches, forward=forward)
        prefix = "" if training.average is None else "ema_"
        metrics |= {f"{prefix}{key}": value for key, value in evaluate(model).items()}
        log.info(
            "recalibrated the statistics of %d layers: accuracy %.2f %%",
            len(layers),
            100 * metrics[f"{prefix}test_accuracy"],
        )
    if run is not None:
        description = Description(
            name=training.config.name,
            architecture=training.architecture,
            input=dataset.input,
            preprocessing=dataset.preprocessing,
            classes=dataset.classes,
            metrics=metrics,
            config_sha256=config_sha256(training.config),
        )
        imports = isinstance(training.config.model, CustomModelConfig)
        if not run.bundle_dir.exists():  # or an attempt before this one was stopped right here
            write_bundle(run.bundle_dir, description, model, allow_imports=imports)
        log.info("bundle written to %s", run.bundle_dir)
        try:
            plot_curves(run.path)
        except OSError as error:  # the model is safe, and that is what counts
            log.warning("no picture of the curves: %s", error)
        # Last, so that the run directory is complete wherever this fails.
        if training.config.publish is not None:
            publish(run.bundle_dir, Path(training.config.publish), training.config.name)
    return metrics
