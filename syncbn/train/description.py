"""What a bundle says of a model that is trained here."""

from collections.abc import Mapping, Sequence

from syncbn.bundle import Architecture, Description, Evaluation
from syncbn.train.config import config_sha256
from syncbn.train.data import Dataset
from syncbn.train.schema import TrainConfig
from syncbn.train.tasks import Task


def describe(
    config: TrainConfig,
    task: Task,
    architecture: Architecture,
    dataset: Dataset,
    metrics: Mapping[str, float] | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> Description:
    """Return all that a bundle says of a model.

    Args:
        config: the job.
        task: what is learned.
        architecture: of the model.
        dataset: the data that it is trained on.
        metrics: of what is exported, finite; None: they are not known yet.
        evaluations: how good it is.

    Raises:
        pydantic.ValidationError: the parts do not fit each other.
    """
    return Description(
        name=config.name,
        task=task.answers,
        architecture=architecture,
        input=dataset.input,
        preprocessing=dataset.preprocessing,
        classes=() if task.answers == "tensor" else dataset.classes,
        palette=dataset.palette if task.answers == "segmentation" else None,
        metrics=dict(metrics or {}),
        evaluations=tuple(evaluations),
        config_sha256=config_sha256(config),
    )
