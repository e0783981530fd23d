"""What the values of a job say against each other, known before it takes a place in the queue."""

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.memory import job_bytes
from syncbn.jobs.offer.optimizers import check_arguments
from syncbn.jobs.offer.settings import SETTINGS_FILE, Limits
from syncbn.train.catalog import torchvision_segmenters
from syncbn.train.schema import (
    ClassificationConfig,
    CnnConfig,
    CustomDataConfig,
    MaskedConfig,
    MlpConfig,
    PenaltyNormConfig,
    RenormalizeNormConfig,
    SegmentationConfig,
    Shares,
    TorchvisionConfig,
    TrainConfig,
    UnetConfig,
)

_MEGABYTE = 10**6


def check_together(config: TrainConfig, limits: Limits) -> None:
    """Check the values of a job that fit their ranges, but may not fit each other.

    The trainer finds the same out, when it has begun.

    Raises:
        SubmissionError: they do not, or would take too much memory or too many processes.
    """
    _check_targets(config)
    _check_model(config)
    check_arguments(config)
    if config.numerics.compile and isinstance(
        config.norm, PenaltyNormConfig | RenormalizeNormConfig
    ):
        raise SubmissionError(
            f"numerics.compile=true: must be false for norm={config.norm.name}, which looks at "
            "activations while the model runs"
        )
    if config.patience is not None and config.data.validation == 0:
        raise SubmissionError(
            f"patience={config.patience}: must be null for data.validation=0, as validation tells "
            "whether an epoch was better"
        )
    _check_size(config, limits)


def _check_targets(config: TrainConfig) -> None:
    """Check that the targets of the data are what the task learns, and can be drawn as asked."""
    data, task = config.data, config.task
    if isinstance(data, MaskedConfig):
        if isinstance(task, ClassificationConfig):
            raise SubmissionError(
                f"task=classification: must be segmentation for data={data.name}, which has masks"
            )
        if data.scale_min > data.scale_max:
            raise SubmissionError(
                f"data.scale_min={data.scale_min:g}: must be at most "
                f"data.scale_max={data.scale_max:g}"
            )
    elif isinstance(task, SegmentationConfig) and not isinstance(data, CustomDataConfig):
        raise SubmissionError(
            f"task=segmentation: must be classification for data={data.name}, which has labels"
        )
    if data.balanced and data.shares is Shares.by_class:
        raise SubmissionError(
            "data.balanced=true: must be false for data.shares=by_class, as it draws from all "
            "classes on each replica"
        )


def _check_model(config: TrainConfig) -> None:
    """Check that a model answers for samples or for pixels, as the task asks."""
    task, model = config.task, config.model
    segments = isinstance(task, SegmentationConfig)
    if isinstance(model, TorchvisionConfig):
        is_segmenter = model.architecture in torchvision_segmenters()
        if segments != is_segmenter:
            others = ", ".join(torchvision_segmenters())
            raise SubmissionError(
                f"model.architecture={model.architecture}: must be "
                f"{'one of' if segments else 'none of'} {others} for task={task.name}"
            )
    if segments and isinstance(model, CnnConfig | MlpConfig):
        raise SubmissionError(
            f"model={model.name}: must be unet, or another that answers for each pixel, for "
            "task=segmentation"
        )
    if not segments and isinstance(model, UnetConfig):
        raise SubmissionError(
            "model=unet: must be another for task=classification, as it answers for each pixel"
        )


def _check_size(config: TrainConfig, limits: Limits) -> None:
    nproc, data = config.launch.nproc, config.data
    if nproc * data.workers > limits.loaders:
        raise SubmissionError(
            f"data.workers={data.workers}: must be at most {limits.loaders // nproc} for "
            f"launch.nproc={nproc}, as all replicas together may have {limits.loaders} "
            f"(limits.loaders of {SETTINGS_FILE})"
        )
    needed = job_bytes(config)
    if needed > limits.memory_bytes:
        sizes = "data.batch_size", "launch.nproc", "data.workers"
        raise SubmissionError(
            f"data.batch_size={data.batch_size}, launch.nproc={nproc}: the job may take "
            f"{needed / _MEGABYTE:.0f} MB of memory, and must be at most "
            f"{limits.memory_bytes / _MEGABYTE:.0f} MB (limits.memory_bytes of {SETTINGS_FILE}); "
            f"choose less of {', '.join(sizes)}, or smaller images, data or models"
        )
