"""Tasks by name: what a model learns, and how good it is at it.

`Task` is the protocol for tasks of your own (`task=custom`).
"""

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.data import Dataset
from syncbn.train.imports import imported
from syncbn.train.schema import (
    ClassificationConfig,
    CustomTaskConfig,
    SegmentationConfig,
    TrainConfig,
)
from syncbn.train.tasks.checks import check_members
from syncbn.train.tasks.classification import Classification
from syncbn.train.tasks.protocol import Task
from syncbn.train.tasks.segmentation import Segmentation

__all__ = ["Classification", "Segmentation", "Task", "make_task"]


def make_task(config: TrainConfig, dataset: Dataset) -> Task:
    """Return the configured task for a data set.

    Raises:
        ConfigError: the task does not fit the data set, or the user's own function fails.
    """
    match config.task:
        case ClassificationConfig() as task:
            return Classification(
                dataset,
                task.class_weights,
                None if task.loss is None else imported(task.loss, "task.loss"),
                config.optim.label_smoothing,
            )
        case SegmentationConfig() as task:
            return Segmentation(
                dataset,
                task.ignore_index,
                task.class_weights,
                None if task.loss is None else imported(task.loss, "task.loss"),
                config.optim.label_smoothing,
                task.dice,
                task.auxiliary,
            )
        case CustomTaskConfig() as task:
            return _custom(task, dataset)
        case _:
            raise AssertionError(f"no task for {config.task}")


def _custom(config: CustomTaskConfig, dataset: Dataset) -> Task:
    factory = imported(config.factory, "task.factory")
    try:
        task: Task = factory(dataset, **config.arguments)
    except SyncBNError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"task.factory={config.factory} failed with task.arguments={config.arguments}: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_members(task, f"task.factory={config.factory}")
    return task
