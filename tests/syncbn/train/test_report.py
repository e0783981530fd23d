import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from syncbn.train.report import (
    best_epoch,
    duration,
    number,
    plot_curves,
    read_records,
    read_result,
    summarise,
)

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
    assert read_records(file) == ([], None)
    file.write_text('{"epoch": 1}\n{"epoch": 2, "test_loss": NaN}\n{"epoch": 3, "te')
    records, damage = read_records(file)
    assert [record["epoch"] for record in records] == [1, 2]
    assert damage is None


def test_damaged_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"epoch": 1}\n{"epo\n[1]\n\xff\xfe\n{"epoch": 5}\n')
    records, damage = read_records(file)
    assert records == [{"epoch": 1}, {"epoch": 5}]
    assert damage == f"lines 2, 3, 4 of {file} cannot be read as JSON objects"


def test_records_that_cannot_be_opened_are_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_records(tmp_path / "metrics.jsonl")[1] == (
        f"cannot read {tmp_path / 'metrics.jsonl'}: Is a directory"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": 3}', "[" * 100_000])
def test_damaged_result_is_described(tmp_path: Path, content: str) -> None:
    file = tmp_path / "result.json"
    assert read_result(file) == (None, None)
    file.write_text(content)
    result, damage = read_result(file)
    assert result is None
    assert damage is not None
    assert str(file) in damage


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, math.inf, 10**400, [1]])
def test_what_is_no_finite_number_is_nan(value: Any) -> None:
    assert math.isnan(number({"key": value}, "key"))
    assert math.isnan(number({}, "key"))
    assert number({"key": 3}, "key") == 3


def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    epochs = [
        _epoch(1, test_accuracy=math.nan, ema_test_accuracy=0.99),
        _epoch(2, test_accuracy=0.9, test_loss=None),
        _epoch(3, test_accuracy=0.9, test_loss=0.2),
        _epoch(4, test_accuracy=0.9, test_loss=0.1),
        _epoch(5, test_accuracy=0.9, test_loss=0.1),
        _epoch(6, test_accuracy=0.8, test_loss=0.01),
    ]
    assert best_epoch(epochs) is epochs[3]
    assert best_epoch(epochs, "ema_") is epochs[0]
    assert best_epoch(epochs[:1]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (math.nan, "–"),
        (0, "–"),
        (7.25, "7.2 s"),
        (187.4, "3 min 07 s"),
        (3599.7, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_duration_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_curves_are_drawn_into_the_run_directory(tmp_path: Path) -> None:
    epochs = [_epoch(epoch, ema_test_loss=1.0, ema_test_accuracy=0.5) for epoch in range(1, 13)]
    run = _run(tmp_path / "run", epochs, [_step(10 * k) for k in range(1, 100)])
    before = {file.name for file in run.iterdir()}
    assert plot_curves(run) == run / "curves.png"
    assert {file.name for file in run.iterdir()} == before | {"curves.png"}
    assert _painted(run / "curves.png") > 0.005


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        ([_epoch(1)], [_step(10)]),
        ([_epoch(1)], []),
        ([], [_step(10), _step(20)]),
        ([_epoch(1), _epoch(2, test_loss=math.nan, lr=None, train_loss=math.inf), _epoch(3)], []),
        ([_epoch(1, test_accuracy="?"), {}, {"epoch": 3}], [{}, {"loss": 1.0}]),
        ([_epoch(1, train_loss=0.0, test_loss=0.0)], []),
        ([], []),
    ],
    ids=["one epoch", "no steps", "no epoch", "gaps", "keys missing", "zero", "nothing"],
)
def test_curves_of_an_incomplete_run_are_drawn(
    tmp_path: Path, epochs: list[Record], steps: list[Record]
) -> None:
    assert _painted(plot_curves(_run(tmp_path / "run", epochs, steps))) > 0.002


@pytest.mark.parametrize("name", ["$x^{$", "_hidden", "名前", "x" * 200])
def test_any_directory_name_is_a_title(tmp_path: Path, name: str) -> None:
    assert _painted(plot_curves(_run(tmp_path / name, [_epoch(1)]))) > 0.002


def test_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "curves.png" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        plot_curves(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_summary_says_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    epochs = [_epoch(1), _epoch(2, test_accuracy=0.98765), _epoch(3, test_accuracy=0.9)]
    run = _run(
        Path("runs/one"), epochs, status="finished", error=None, metrics=epochs[1], duration_s=187.4
    )
    (run / "bundle").mkdir()
    (run / "checkpoints").mkdir()
    plot_curves(run)
    assert summarise(run).splitlines() == [
        "status       finished after 3 epochs, 270 steps",
        "best         epoch 2: test accuracy 98.77 %, test loss 1.1000",
        "last         epoch 3: test accuracy 90.00 %, test loss 0.7333, training loss 0.6667",
        "time         3 min 07 s, 1002 images/s",
        "bundle       runs/one/bundle",
        "checkpoints  runs/one/checkpoints",
        "picture      runs/one/curves.png",
    ]
    assert summarise(run.resolve()) == summarise(run)


def test_summary_tells_averaged_weights_and_recalibrated_statistics(tmp_path: Path) -> None:
    epochs = [_epoch(1, ema_test_accuracy=0.5, ema_test_loss=0.75)]
    exported = epochs[0] | {"ema_test_accuracy": 0.625}
    run = _run(tmp_path, epochs, status="finished", error=None, metrics=exported, duration_s=1.0)
    lines = summarise(run).splitlines()
    assert lines[0] == "status    finished after 1 epoch, 90 steps"
    assert lines[1:3] == [
        "best      epoch 1: test accuracy of the averaged weights 50.00 %, test loss 0.7500",
        "exported  test accuracy of the averaged weights 62.50 %, test loss 0.7500",
    ]


def test_summary_of_a_failed_run_says_why(tmp_path: Path) -> None:
    run = _run(tmp_path, [], status="failed", error="the loss is nan", metrics={}, duration_s=0)
    assert summarise(run).splitlines() == [
        "status  failed after 0 epochs, 0 steps",
        "error   the loss is nan",
        "time    –",
    ]


def test_summary_of_a_run_without_result(tmp_path: Path) -> None:
    assert summarise(tmp_path).startswith("status  has not ended after 0 epochs")


def test_importing_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, syncbn.train.report;"
        "print(*[name for name in ('torch', 'matplotlib', 'hydra') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []
