"""Intervals that hold the true value of a metric with 95 % confidence, from a sample of data."""

import math
from statistics import NormalDist

import numpy as np
from torch import Tensor

from syncbn.train.step import mean
from syncbn.train.tasks import Task

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_RESAMPLES = 1000
_CHUNK_VALUES = 1 << 22


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Return the interval of a proportion: of independent trials, so many successes.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    share = successes / trials
    middle = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    width = share * (1 - share) / trials + _Z**2 / (4 * trials**2)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(width)
    return max(0.0, middle - half), min(1.0, middle + half)


def intervals(task: Task, rows: Tensor) -> dict[str, tuple[float, float]]:
    """Return the interval of the loss and of each metric, by name.

    Of proportions Wilson's, if something was tried and no more succeeded; of the others by the
    percentiles of metrics of 1000 samples that are drawn from the rows, with replacement, with a
    fixed seed: the same rows have the same intervals.

    Args:
        task: what makes metrics of sums.
        rows: a row for each sample, shape (n, 2 + S), float64: its loss, its weight, and what the
            task observed of it.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979), section 2.
    """
    table = rows.numpy()
    count = len(table)
    chance = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    left = _RESAMPLES
    while left:
        size = min(left, max(1, _CHUNK_VALUES // count))
        times = chance.multinomial(count, np.full(count, 1 / count), size=size)
        for sums in (times @ table).tolist():
            values = {"loss": mean(sums[0], sums[1]), **task.metrics(sums[2:])}
            for name, value in values.items():
                drawn.setdefault(name, []).append(value)
        left -= size
    tail = 100 * (1 - CONFIDENCE) / 2
    found: dict[str, tuple[float, float]] = {}
    for name, values in drawn.items():
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            low, high = np.percentile(finite, [tail, 100 - tail])
            found[name] = float(low), float(high)
    totals = table.sum(0).tolist()[2:]
    for name, (successes, trials) in task.proportions.items():
        if totals[trials] and 0 <= totals[successes] <= totals[trials]:
            found[name] = wilson(totals[successes], totals[trials])
    return found
