"""Gradients that are not finite under a loss that is: what they end, and what they never reach."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.train.judge import is_good
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory
from tests.support.jobs import comparable
from tests.support.runs import explained, train_small
from tests.support.world import run_world

MODULE = "tests.syncbn.train.test_judge"


class _Spoiled(torch.autograd.Function):
    """The identity, whose gradient is NaN if asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: bool) -> Tensor:
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0] * math.nan if ctx.spoil else grads[0]), None


class _Model(nn.Module):
    """Has a gradient of NaN on rank 1 in some of its steps, counted from 1."""

    def __init__(self, in_channels: int, num_classes: int, steps: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.BatchNorm1d(num_classes)
        )
        self.calls = 0
        self._steps = steps

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        step = self.calls - 2  # two calls try zeros and the last batch
        spoil = self.training and step in self._steps and dist.get_rank() == 1
        return _Spoiled.apply(self.layers(x), spoil)  # pyright: ignore[reportReturnType] -- what torch's stub lacks


def make_once(in_channels: int, num_classes: int) -> nn.Module:
    return _Model(in_channels, num_classes, (6,))


def make_twice(in_channels: int, num_classes: int) -> nn.Module:
    return _Model(in_channels, num_classes, (3, 4))


def make_often(in_channels: int, num_classes: int) -> nn.Module:
    return _Model(in_channels, num_classes, tuple(range(4, 99)))


def make_healthy(in_channels: int, num_classes: int) -> nn.Module:
    return _Model(in_channels, num_classes, ())


# 1293 images, 400 a step: 4 steps an epoch, 8 in all, of which the last of each is smaller.
COMMON = [
    *("model=custom", "data.batch_size=200", "epochs=2", "optim.ema_decay=0.9"),
    *("schedule.warmup_steps=3", "checkpoint.keep=3"),
]


def _job(run_dir: Path, factory: str, *more: str) -> list[str]:
    return [*COMMON, f"run_dir={run_dir}", f"model.factory={MODULE}:{factory}", *more]


def _newest(run_dir: Path) -> Any:
    return read_checkpoint(checkpoint_files(run_dir / "checkpoints")[0])


@pytest.mark.parametrize("late", [None, 3], ids=["at once", "late"])
def test_gradient_that_is_not_finite_ends_a_float32_run_and_reaches_nothing(
    tmp_path: Path, late: int | None
) -> None:
    bad = tmp_path / "bad"
    texts = run_world(2, explained, _job(bad, "make_once"), late)
    for text in texts:
        assert text.startswith("TrainingError: the loss is "), text
        assert " and its gradient not finite at step 6 (epoch 2, after 400 of 1293 samples" in text
        assert "the state before this step is in checkpoints/step-000000005.ckpt" in text
    assert [line["epoch"] for line in RunDirectory(bad).read_metrics()] == [1]
    assert not (bad / "bundle").exists()
    kept = _newest(bad)
    assert (kept.position.step, kept.position.epoch, kept.position.samples) == (5, 1, 400)
    assert all(tensor.isfinite().all() for tensor in kept.states["model"].values())
    assert kept.states["schedule"]["step"] == 5

    # The next attempt counts calls anew and meets no NaN; it ends as if there had been none.
    run_world(2, train_small, _job(bad, "make_once"), torch.float32, late)
    run_world(2, train_small, _job(tmp_path / "whole", "make_healthy"), torch.float32, late)
    ours, theirs = _newest(bad), _newest(tmp_path / "whole")
    assert comparable(ours.states) == comparable(theirs.states)


def _train_and_listen(overrides: list[str], late: int | None) -> tuple[Any, list[str]]:
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("syncbn")
    logger.addHandler(Listener())
    logger.setLevel(logging.INFO)
    return train_small(overrides, late=late), messages


@pytest.mark.parametrize("late", [None, 3], ids=["at once", "late"])
def test_skipped_steps_of_float16_are_logged_counted_and_move_nothing(
    tmp_path: Path, late: int | None
) -> None:
    job = _job(tmp_path / "run", "make_twice", "numerics.precision=float16", "schedule=constant")
    (_, messages), _ = run_world(2, _train_and_listen, job, late)
    found = [message for message in messages if "is skipped" in message]
    assert found == [
        f"step {step} is skipped: its gradient overflowed float16 ({in_a_row} in a row); the scale "
        "of the loss is halved"
        for step, in_a_row in ((3, 1), (4, 2))
    ]
    lines = RunDirectory(tmp_path / "run").read_metrics()
    assert [line["skipped_steps"] for line in lines] == [2, 0]
    assert any("2 steps skipped" in message for message in messages)
    end = _newest(tmp_path / "run")
    assert end.position.step == 8
    assert end.states["schedule"]["step"] == 6
    assert int(end.states["average"]["n_averaged"]) == 6
    assert end.states["scaler"]["scale"] == 2.0**16 / 4


@pytest.mark.parametrize("late", [None, 3], ids=["at once", "late"])
def test_too_many_skipped_steps_in_a_row_end_the_run_over_the_end_of_an_epoch(
    tmp_path: Path, late: int | None
) -> None:
    more = ("numerics.precision=float16", "numerics.max_skipped_steps=2")
    for text in run_world(2, explained, _job(tmp_path / "run", "make_often", *more), late):
        assert text.startswith(
            "TrainingError: the gradient was not finite in 3 steps in a row (at most "
            "numerics.max_skipped_steps=2), each with a smaller scale of the loss at step 6 "
        )
    kept = _newest(tmp_path / "run")
    assert kept.position.step == 5
    assert kept.states["schedule"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in kept.states["model"].values())


def _good_by_rank(bad_rank: int) -> bool:
    model = nn.BatchNorm1d(2)
    if dist.get_rank() == bad_rank:
        assert model.running_mean is not None
        model.running_mean[1] = math.nan
    return is_good(model)


def test_state_of_one_rank_that_is_not_good_is_so_for_all() -> None:
    assert run_world(2, _good_by_rank, 1) == [False, False]
    assert run_world(2, _good_by_rank, 2) == [True, True]


def test_weights_that_overflow_reach_no_checkpoint(tmp_path: Path) -> None:
    # The gradient of the first step is finite, and the step is not.
    overrides = ["norm=none", "optim.lr=1e39", "schedule.warmup_steps=0"]
    overrides += ["checkpoint.every_steps=1", f"run_dir={tmp_path / 'run'}"]
    for late in (None, 3):
        texts = run_world(2, explained, overrides, late)
        assert texts[0].startswith(
            "TrainingError: a weight is not finite after step 1, in epoch 1;"
        )
        assert texts[0] == texts[1]
        assert checkpoint_files(tmp_path / "run" / "checkpoints") == []
