"""What tasks have in common: class weights, a loss of the user's own, and checks of outputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.data import Dataset
from syncbn.train.data.checks import Targets, kind_of_targets

_TASKS = {"labels": "task=classification", "masks": "task=segmentation"}


def exact(logits: Tensor) -> Tensor:
    """Return logits in float32, unless they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_targets(dataset: Dataset, task: str, needed: Targets) -> None:
    """Raise unless the targets of a data set are those that a task learns.

    Raises:
        ConfigError: they are others.
    """
    kind = kind_of_targets(dataset)
    if kind != needed:
        found = "neither labels nor masks" if kind == "other" else kind
        raise ConfigError(
            f"task={task} learns from {needed}, and the targets of the data are {found}; choose "
            f"{_TASKS.get(kind, 'task=custom')}, or other data"
        )


def check_class_weights(weights: Sequence[float] | None, classes: int) -> Tensor | None:
    """Return the weights of classes, shape (classes,), float64, on the CPU.

    Raises:
        ConfigError: they are not as many as the classes, or not all positive and finite.
    """
    if weights is None:
        return None
    good = len(weights) == classes and all(0 < weight < math.inf for weight in weights)
    if not good:
        raise ConfigError(
            f"task.class_weights={list(weights)} are {len(weights)} numbers; give {classes} "
            "positive ones, one for each class in the order of the classes, or null"
        )
    return torch.tensor(weights, dtype=torch.float64)


def check_logits(output: object, shape: tuple[int, ...]) -> None:
    """Raise unless an output is a tensor of a shape.

    Raises:
        ConfigError: it is another one.
    """
    if not isinstance(output, Tensor) or tuple(output.shape) != shape:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"model: gives {found}, and the task needs logits of shape {shape}; choose a model for "
            "this task, or task=custom"
        )


def own_losses(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Return what a loss of the user's own returns, which must have the targets' shape.

    Raises:
        ConfigError: it has another one, or the function fails.
    """
    try:
        losses: Any = loss(logits, targets)
    except (SyncBNError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"task.loss failed for outputs of shape {tuple(logits.shape)} and targets of shape "
            f"{tuple(targets.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"task.loss returned {found} for targets of shape {tuple(targets.shape)}; it must "
            "return a loss for each target, without a mean over them"
        )
    return losses
