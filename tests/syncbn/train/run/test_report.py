import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from syncbn.train.run.plots import plot_curves, title
from syncbn.train.run.report import best_epoch, duration, read_records, read_result, summarize

Record = dict[str, Any]


def _epoch(epoch: int, **changed: Any) -> Record:
    record = {
        "epoch": epoch,
        "step": 90 * epoch,
        "lr": 0.1 / epoch,
        "train_loss": 2 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "test_loss": 2.2 / epoch,
        "test_accuracy": 1 - 0.6 / epoch,
        "images_per_s": 1000.0 + epoch,
    }
    return record | changed


def _step(step: int) -> Record:
    return {"step": step, "epoch": step / 90, "lr": 0.1, "loss": 2.3, "accuracy": 0.2}


def _run(path: Path, epochs: Sequence[Record], steps: Sequence[Record] = (), **result: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, records in (("metrics.jsonl", epochs), ("steps.jsonl", steps)):
        (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    if result:
        (path / "result.json").write_text(json.dumps(result))
    return path


def _painted(file: Path) -> float:
    """Return the variance of a picture's pixels, after checking that it is of a sensible size."""
    image: Any = imread(file)
    height, width, _ = image.shape
    assert 400 <= height <= 1500
    assert 800 <= width <= 2000
    return float(image[..., :3].var())


def test_records_before_a_cut_line_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == ([], [])
    file.write_text('{"epoch": 1}\n{"epoch": 2, "test_loss": NaN}\n{"epoch": 3, "te')
    records, damaged = read_records(file)
    assert [record["epoch"] for record in records] == [1, 2]
    assert damaged == []


def test_damaged_lines_are_numbered_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"epoch": 1}\n{"epo\n[1]\n\xff\xfe\n{"lr": null}\n{"epoch": 6}\n')
    assert read_records(file) == ([{"epoch": 1}, {"epoch": 6}], [2, 3, 4, 5])


@pytest.mark.parametrize("content", ["[]", '{"error": null}', '{"status": "done"}', "{"])
def test_damaged_result_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "result.json"
    assert read_result(file) == {}
    file.write_text(content)
    with pytest.raises(ValueError, match=r"no status of finished, failed, interrupted|Expecting"):
        read_result(file)


def test_best_epoch_is_the_latest_that_was_noted_as_the_best_so_far() -> None:
    epochs = [_epoch(1, best=1.0), _epoch(2, best=1.0), _epoch(3, best=0.0)]
    assert best_epoch(epochs) is epochs[1]
    assert best_epoch([_epoch(1, best=0.0)]) == {}


def test_best_epoch_of_an_earlier_version_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    epochs = [
        _epoch(1, test_accuracy=math.nan, ema_test_accuracy=0.99),
        _epoch(2, test_accuracy=0.9, test_loss=math.inf),
        _epoch(3, test_accuracy=0.9, test_loss=0.2),
        _epoch(4, test_accuracy=0.9, test_loss=0.1),
        _epoch(5, test_accuracy=0.9, test_loss=0.1),
        _epoch(6, test_accuracy=0.8, test_loss=0.01),
    ]
    assert best_epoch(epochs) is epochs[3]
    averaged = [_epoch(1, test_accuracy=0.9, ema_test_accuracy=0.8)]
    averaged.append(_epoch(2, test_accuracy=0.8, ema_test_accuracy=0.9))
    assert best_epoch(averaged) is averaged[1]
    assert best_epoch([_epoch(1, test_accuracy=math.nan)]) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (math.nan, "–"),
        (7.25, "7.2 s"),
        (187.4, "3 min 07 s"),
        (3599.7, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_duration_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


_AVERAGED = [
    _epoch(epoch, ema_test_loss=1.0, ema_test_accuracy=0.5, train_loss=0.02) for epoch in (1, 2, 3)
]


@pytest.mark.parametrize(
    ("name", "epochs", "steps"),
    [
        ("$x^{$", _AVERAGED, [_step(10 * k) for k in range(1, 30)]),
        ("one epoch", [_epoch(1, train_loss=0.0)], []),
        ("no epoch", [], [_step(10), _step(20)]),
        ("gaps", [_epoch(1), _epoch(2, test_loss=math.nan, train_loss=math.inf), {"epoch": 3}], []),
        ("nothing", [], []),
    ],
)
def test_curves_are_drawn_of_what_there_is(
    tmp_path: Path, name: str, epochs: list[Record], steps: list[Record]
) -> None:
    run = _run(tmp_path / name, epochs, steps)
    before = {file.name for file in run.iterdir()}
    assert plot_curves(run) == run / "curves.png"
    assert {file.name for file in run.iterdir()} == before | {"curves.png"}
    assert _painted(run / "curves.png") > 0.002


def test_picture_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError, match="directory"):
        plot_curves(tmp_path)


def test_summary_says_how_a_run_ended(tmp_path: Path) -> None:
    epochs = [_judged(1, 0.5, 1.0), _judged(2, 0.98765, 1.0), _judged(3, 0.9, 0.0)]
    estimate = {"value": 0.9, "low": 0.8523, "high": 0.9376}
    metrics = {"loss": {"value": 0.5, "low": None, "high": None}, "accuracy": estimate}
    evaluation = {"split": "test", "samples": 200, "statistics": "as trained", "metrics": metrics}
    again = evaluation | {"statistics": "recalibrated"}
    result = {"error": None, "metrics": epochs[1], "duration_s": 187.4}
    run = _run(tmp_path, epochs, (), status="finished", evaluations=[evaluation, again], **result)
    (run / "bundle").mkdir()
    judged = "validation loss 0.7500, validation accuracy"
    tested = "loss 0.5000, accuracy 90.00 % (85.23 % to 93.76 %); 200 samples"
    assert summarize(run).splitlines() == [
        "status        finished after 3 epochs, 270 steps",
        f"best          epoch 2: {judged} 98.77 %, training loss 1.0000",
        f"last          epoch 3: {judged} 90.00 %, training loss 0.6667",
        f"test          {tested}, statistics as trained",
        f"recalibrated  {tested}, statistics recalibrated",
        "time          3 min 07 s, 1002 images/s",
        f"bundle        {run}/bundle",
    ]


def _judged(epoch: int, accuracy: float, best: float) -> Record:
    line = _epoch(epoch, val_loss=0.75, val_accuracy=accuracy, best=best)
    return {key: value for key, value in line.items() if not key.startswith("test_")}


def test_summary_tells_the_metrics_of_the_average_if_that_is_exported(tmp_path: Path) -> None:
    epochs = [_judged(1, 0.5, 1.0) | {"ema_val_accuracy": 0.625, "ema_val_loss": 0.5}]
    run = _run(tmp_path, epochs, status="finished", metrics=epochs[0], duration_s=1.0)
    assert "best    epoch 1: validation accuracy 62.50 %, validation loss 0.5000, " in summarize(
        run
    )


def test_summary_of_a_run_without_validation_tells_the_last_epoch(tmp_path: Path) -> None:
    line = {key: value for key, value in _epoch(2, best=1.0).items() if not key.startswith("test_")}
    run = _run(tmp_path, [line], status="finished", metrics=line, duration_s=1.0)
    assert "last    epoch 2: training loss" in summarize(run)


def test_summary_of_a_run_of_an_earlier_version_tells_the_test_split(tmp_path: Path) -> None:
    epochs = [_epoch(1), _epoch(2, test_accuracy=0.98765), _epoch(3, test_accuracy=0.9)]
    run = _run(tmp_path, epochs, status="finished", metrics=epochs[1], duration_s=1.0)
    assert "best    epoch 2: test loss 1.1000, test accuracy 98.77 %, training loss" in summarize(
        run
    )


def test_summary_of_a_failed_run_says_why(tmp_path: Path) -> None:
    assert summarize(tmp_path).splitlines()[0] == "status  has not ended after 0 epochs, 0 steps"
    run = _run(tmp_path, [], status="failed", error="the loss is nan", metrics={}, duration_s=0)
    assert summarize(run).splitlines() == [
        "status  failed after 0 epochs, 0 steps",
        "error   the loss is nan",
        "time    0.0 s",
    ]


@pytest.mark.parametrize(
    ("directory", "config", "called"),
    [
        ("2026-11-30T10-00-00-digits-cnn-sync-a1b2c3", "name: digits-cnn", None),
        ("norm=local,seed=1", "name: digits-cnn", "digits-cnn, norm=local,seed=1"),
        ("defaults", "name: digits-cnn", "digits-cnn"),
        ("run", "name: digits-cnn", "digits-cnn"),
        ("defaults", "name: [", "defaults"),
        ("first", "", "first"),
    ],
)
def test_picture_is_called_by_the_job_and_what_tells_it_from_others(
    tmp_path: Path, directory: str, config: str, called: str | None
) -> None:
    (run := tmp_path / directory).mkdir()
    (run / "config.yaml").write_text(config)
    assert title(run) == (called or directory)
