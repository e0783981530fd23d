"""Intervals of metrics: Wilson's by hand, and percentiles of resampled rows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from syncbn.train.interval import intervals, wilson
from syncbn.train.tasks import Classification, Segmentation
from tests.support.samples import dataset_of


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 10), (10, 10), (1, 1), (50, 100), (348, 360), (1, 100000)]
)
def test_share_has_wilsons_interval(successes: int, trials: int) -> None:
    found = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((found.low, found.high), abs=1e-14)


def test_ends_of_wilsons_interval_solve_its_equation() -> None:
    z = 1.959963984540054
    for successes, trials in ((3, 17), (90, 91), (1, 1000)):
        share = successes / trials
        for end in wilson(successes, trials):
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials))


def _rows(correct: Tensor, losses: Tensor) -> Tensor:
    ones = torch.ones_like(losses)
    return torch.stack([losses, ones, ones, correct.double()], dim=1)


def test_interval_of_the_loss_is_near_that_of_a_normal_mean() -> None:
    task = Classification(dataset_of(torch.zeros(2, dtype=torch.int64), 2))
    losses = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    found = intervals(task, _rows(losses > 3, losses))
    low, high = found["loss"]
    half = 1.96 * losses.std().item() / math.sqrt(400)
    assert low == pytest.approx(losses.mean().item() - half, abs=0.2 * half)
    assert high == pytest.approx(losses.mean().item() + half, abs=0.2 * half)
    assert found["accuracy"] == wilson(int((losses > 3).sum()), 400)


def test_more_successes_than_trials_have_an_interval_by_resampling() -> None:
    task = Classification(dataset_of(torch.zeros(2, dtype=torch.int64), 2))
    losses = torch.ones(4, dtype=torch.float64)
    rows = _rows(torch.tensor([2.0, 3.0, 2.0, 3.0]), losses)
    low, high = intervals(task, rows)["accuracy"]
    assert 2 <= low < 2.5 < high <= 3


def _segmentation() -> Segmentation:
    return Segmentation(dataset_of(torch.zeros(1, 8, 8, dtype=torch.int64), 3))


def _drawn(chance: Any, count: int, task: Segmentation) -> Tensor:
    """Return rows of images, each of its own difficulty, whose classes are about as frequent."""
    rows: list[list[float]] = []
    for ease in chance.uniform(0.3, 0.95, count):
        there = chance.multinomial(64, [1 / 3] * 3)
        right = [int(chance.binomial(pixels, ease)) for pixels in there]
        wrong = 64 - sum(right)
        found = [hit + wrong / 3 for hit in right]
        rows.append([64 * (1 - ease), 64, *right, *found, *there.tolist()])
    assert len(rows[0]) == 2 + task.statistics
    return torch.tensor(rows, dtype=torch.float64)


def test_resampled_intervals_hold_the_true_value_nearly_as_often_as_they_say() -> None:
    task, chance = _segmentation(), np.random.default_rng(7)
    truth = task.metrics(_drawn(chance, 20000, task).sum(0).tolist()[2:])
    held = dict.fromkeys(truth, 0)
    trials = 150
    for _ in range(trials):
        found = intervals(task, _drawn(chance, 60, task))
        for name, value in truth.items():
            low, high = found[name]
            held[name] += low <= value <= high
    # 142.5 ± 2.7 of 150 would be exact; percentiles of few images hold it a little less often.
    assert all(times >= 132 for times in held.values()), held


def test_intervals_depend_on_the_rows_alone() -> None:
    task = _segmentation()
    rows = _drawn(np.random.default_rng(1), 30, task)
    first = intervals(task, rows)
    torch.manual_seed(5)
    np.random.seed(5)
    assert intervals(task, rows.clone()) == first
    # As gathered from three ranks, each with every third.
    every = torch.empty_like(rows)
    for rank in range(3):
        every[rank::3] = rows[rank::3]
    assert intervals(task, every) == first


def test_one_sample_has_an_interval_of_a_point() -> None:
    task = _segmentation()
    found = intervals(task, _drawn(np.random.default_rng(1), 1, task))
    assert all(low == high for low, high in found.values())


def test_class_that_no_image_has_does_not_count() -> None:
    task = _segmentation()
    rows = _drawn(np.random.default_rng(1), 20, task)
    rows[:, [4, 7, 10]] = 0
    found = intervals(task, rows)
    assert all(0 < low < high < 1 for name, (low, high) in found.items() if name != "loss")


def test_images_without_valid_pixels_have_no_interval_of_a_metric() -> None:
    task = _segmentation()
    found = intervals(task, torch.zeros(4, 2 + task.statistics, dtype=torch.float64))
    assert found == {"loss": (0.0, 0.0)}


class _OfOneClass(Classification):
    def __init__(self) -> None:
        super().__init__(dataset_of(torch.zeros(2, dtype=torch.int64), 2))
        self.proportions: Mapping[str, tuple[int, int]]
        self.proportions = {"accuracy": (1, 0), "recall": (1, 2)}
        self.statistics = 3

    def metrics(self, sums: Any) -> dict[str, float]:
        return {
            "accuracy": sums[1] / sums[0],
            "recall": sums[1] / sums[2] if sums[2] else math.nan,
        }


def test_share_of_which_nothing_was_tried_has_no_interval() -> None:
    rows = torch.tensor([[0.5, 1, 1, 1, 0], [0.25, 1, 1, 0, 0]], dtype=torch.float64)
    assert intervals(_OfOneClass(), rows).keys() == {"loss", "accuracy"}
