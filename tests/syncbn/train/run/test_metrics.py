"""Metrics of any task in what is told of runs."""

import json
from pathlib import Path

import pytest

from syncbn.train.run.comparison import default_metric, find_runs
from syncbn.train.run.report import is_share, summarize


def _run(path: Path, **metrics: float) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    line = {"epoch": 1, "step": 2, "lr": 0.1, **metrics, "images_per_s": 1.0, "best": 1}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return path


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"train_loss": 1, "train_mean_iou": 1, "val_loss": 1, "val_mean_iou": 1}, "val_mean_iou"),
        ({"train_loss": 1, "train_mean_iou": 1, "train_pixel_accuracy": 1}, "train_mean_iou"),
        ({"train_loss": 1, "train_error": 1, "val_loss": 1, "val_error": 1}, "val_error"),
        ({"train_loss": 1, "train_error": 1}, "train_error"),
        ({}, "val_accuracy"),
    ],
)
def test_metric_that_tells_most_is_of_any_task(
    tmp_path: Path, metrics: dict[str, float], told: str
) -> None:
    assert default_metric(find_runs([_run(tmp_path / "run", **metrics)])) == told


def test_shares_alone_are_in_percent(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "run", train_loss=1, val_loss=0.5, val_squared_error=5.25, val_accuracy=0.25
    )
    assert (
        "best    epoch 1: validation loss 0.5000, validation squared error 5.25, validation "
        "accuracy 25.00 %, training loss 1.0000"
    ) in summarize(run)
    assert [is_share(name) for name in ("val_mean_iou", "top5_accuracy", "error")] == [1, 1, 0]
