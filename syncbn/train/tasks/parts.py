"""What tasks have in common: class weights, a loss of the user's own, and checks of outputs."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import ConfigError


def exact(logits: Tensor) -> Tensor:
    """Return logits in float32, unless they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
            f"task.class_weights={list(weights)} must be {classes} positive numbers, one for each "
            "class"
        )
    return torch.tensor(weights, dtype=torch.float64)


def check_logits(output: object, shape: tuple[int, ...]) -> None:
    """Raise unless an output is a tensor of a shape.

    Raises:
        ConfigError: it is another one.
    """
    if not isinstance(output, Tensor) or tuple(output.shape) != shape:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"model: gives {found} if logits of shape {shape} are needed")


def own_losses(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Return what a loss of the user's own returns, which must have the targets' shape.

    Raises:
        ConfigError: it has another one.
    """
    losses: Any = loss(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"task.loss returned {found} for targets of shape {tuple(targets.shape)}; it must "
            "return a loss for each target, without a mean over them"
        )
    return losses


def imported(path: str, key: str) -> Any:
    """Return what an import path names, which must be callable.

    Args:
        path: package.module:name.
        key: of the configuration, for errors.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever somebody else's module raises
        raise ConfigError(
            f"{key}={path} cannot be imported: {type(error).__name__}: {error}; it must be "
            "package.module:name, of a package that is installed or in PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key}={path} is a {type(found).__name__}; it must be a function")
    return found
