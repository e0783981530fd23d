"""Which epoch is the best, by validation, and what a sweep minimizes."""

import math
from collections.abc import Mapping

from syncbn.train.tasks import Task

# Where the metrics of what is exported are: of the average if there is one, and of the training
# data if there are no validation data.
_PREFIXES = ("ema_val_", "val_", "train_")


def quality(metrics: Mapping[str, float], task: Task) -> tuple[float, float]:
    """Return what the best epoch has the most of: the task's metric, and then a low loss.

    Args:
        metrics: of an epoch; an empty mapping is worse than any. An epoch whose metric is NaN, as
            of no pixels, is worse than all that have one.
        task: says which metric counts.
    """
    if not metrics:
        return -math.inf, -math.inf
    prefix = _prefix(metrics, task)
    value = metrics[f"{prefix}{task.best}"]
    if math.isnan(value):
        value = -math.inf if task.maximize else math.inf
    return value if task.maximize else -value, -metrics[f"{prefix}loss"]


def objective(metrics: Mapping[str, float], task: Task) -> float | None:
    """Return what a sweep minimizes: 1 − the task's metric, or the metric if less is better.

    None if that is not finite, which a sweeper takes for a failure.

    Args:
        metrics: of the epoch that is exported.
        task: says which metric counts.
    """
    value = metrics.get(f"{_prefix(metrics, task)}{task.best}", math.nan)
    error = 1 - value if task.maximize else value
    return error if math.isfinite(error) else None


def _prefix(metrics: Mapping[str, float], task: Task) -> str:
    return next((prefix for prefix in _PREFIXES if f"{prefix}{task.best}" in metrics), "")
