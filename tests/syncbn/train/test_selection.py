"""Which epoch is the best, when a run stops early, and what a sweep minimizes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.train.config import compose_config
from syncbn.train.data import Dataset
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.report import summarize
from syncbn.train.selection import objective, quality
from syncbn.train.tasks import Classification
from tests.support.runs import explained, train_small
from tests.support.samples import dataset_of
from tests.support.world import run_world

TASK = Classification(dataset_of(torch.zeros(2, dtype=torch.int64), 2))


def _epoch(accuracy: float, loss: float, prefix: str = "val_", **more: float) -> dict[str, float]:
    return {f"{prefix}accuracy": accuracy, f"{prefix}loss": loss, **more}


def test_best_epoch_has_the_highest_metric_and_of_equals_the_lowest_loss() -> None:
    epochs = [
        _epoch(math.nan, 0.0),
        _epoch(0.9, 0.3),
        _epoch(0.9, 0.2),
        _epoch(0.9, 0.2, later=1),
        _epoch(0.8, 0.0),
    ]
    assert max(epochs, key=lambda epoch: quality(epoch, TASK)) is epochs[2]
    assert quality(epochs[2], TASK) == quality(epochs[3], TASK)
    assert quality(epochs[0], TASK) > quality({}, TASK)


def test_average_is_judged_if_there_is_one() -> None:
    epoch = _epoch(0.5, 1.0, "ema_val_") | _epoch(0.9, 0.1) | _epoch(1.0, 0.0, "train_")
    assert quality(epoch, TASK) == (0.5, -1.0)
    assert objective(epoch, TASK) == 0.5


def test_objective_is_of_validation_or_else_of_training() -> None:
    assert objective(_epoch(0.75, 1) | _epoch(1.0, 0, "test_"), TASK) == 0.25
    assert objective(_epoch(0.625, 1, "train_") | _epoch(1.0, 0, "test_"), TASK) == 0.375
    assert objective({}, TASK) is None


DIGITS = ["data.batch_size=360", "schedule=constant", "schedule.warmup_steps=0"]


def test_run_ends_when_no_epoch_was_better_for_a_while_and_goes_on_with_more_patience(
    tmp_path: Path,
) -> None:
    # A rate at which nothing is learned: of equals, the first epoch is the best.
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "norm=none", "patience=2", "epochs=9"]
    overrides = [*DIGITS, *still, f"run_dir={tmp_path / 'run'}"]
    run = RunDirectory(tmp_path / "run")
    for result in run_world(2, train_small, overrides):
        assert (result.status, result.metrics["epoch"]) == ("finished", 1)
    assert [line["best"] for line in run.read_metrics()] == [1, 0, 0]
    assert (run.bundle_dir / "model.safetensors").exists()
    run_world(2, train_small, [*overrides, "patience=4"])
    assert [line["epoch"] for line in run.read_metrics()] == [1, 2, 3, 4, 5]


def test_patience_without_validation_is_refused_with_what_to_do(tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", "patience=2", "data.validation=0"]
    assert (
        run_world(2, explained, overrides)
        == [
            "ConfigError: patience=2 needs validation data, by which epochs are compared; set "
            "data.validation=0.1, or patience=null"
        ]
        * 2
    )


def test_last_epoch_is_exported_without_validation_and_the_texts_say_so(tmp_path: Path) -> None:
    overrides = [*DIGITS, f"run_dir={tmp_path / 'run'}", "data.validation=0", "epochs=3"]
    (result, messages) = run_world(1, _train_and_listen, overrides)[0]
    assert result.metrics["epoch"] == 3
    lines = RunDirectory(tmp_path / "run").read_metrics()
    assert [line["best"] for line in lines] == [1, 1, 1]
    assert not any(key.startswith(("val_", "test_")) for line in lines for key in line)
    assert result.objective == 1 - lines[-1]["train_accuracy"]
    assert "no validation data tell which epoch is the best: the last one is exported" in messages
    assert not any("(best)" in message for message in messages)
    summary = summarize(tmp_path / "run")
    assert "; without validation, the last epoch is exported" in summary
    assert "\nbest " not in summary


def _train_and_listen(overrides: list[str]) -> tuple[Any, list[str]]:
    import logging

    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("syncbn")
    logger.addHandler(Listener())
    logger.setLevel(logging.INFO)
    return train_small(overrides), messages


def test_both_statistics_are_measured_on_the_same_test_samples(tmp_path: Path) -> None:
    overrides = [*DIGITS, f"run_dir={tmp_path / 'run'}", "epochs=1", "recalibrate=true"]
    (result,) = run_world(1, train_small, overrides)
    found = [(each["split"], each["samples"], each["statistics"]) for each in result.evaluations]
    assert found == [("test", 360, "as trained"), ("test", 360, "recalibrated")]
    trained, recalibrated = (each["metrics"] for each in result.evaluations)
    assert trained["loss"]["value"] != recalibrated["loss"]["value"]
    assert result.metrics["test_loss"] == recalibrated["loss"]["value"]
    for each in (*trained.values(), *recalibrated.values()):
        assert each["low"] <= each["value"] <= each["high"]
    from syncbn.bundle import read_manifest

    manifest = read_manifest(tmp_path / "run" / "bundle")
    assert [each.model_dump() for each in manifest.evaluations] == result.evaluations


def make_without_test() -> Dataset:
    labels = torch.arange(40) % 3
    return dataset_of(labels, 3, validation=labels[:9])


def make_training_alone() -> Dataset:
    return dataset_of(torch.arange(40) % 3, 3)


@pytest.mark.parametrize(
    ("factory", "splits"), [("make_without_test", ["validation"]), ("make_training_alone", [])]
)
def test_without_test_data_the_validation_data_tell_or_nothing_does(
    tmp_path: Path, factory: str, splits: list[str]
) -> None:
    overrides = ["data=custom", f"data.factory={__name__}:{factory}", "data.validation=0"]
    overrides += ["epochs=1", "data.batch_size=8", f"run_dir={tmp_path / 'run'}"]
    result, _ = run_world(2, train_small, overrides)
    assert [each["split"] for each in result.evaluations] == splits
    assert not any(name.startswith("test_") for name in result.metrics)
    if splits:
        (evaluation,) = result.evaluations
        assert evaluation["samples"] == 9
        assert evaluation["metrics"]["accuracy"]["value"] == result.metrics["val_accuracy"]
    assert (tmp_path / "run" / "bundle" / "model.safetensors").exists()


@pytest.mark.parametrize("patience", ["0", "-1", "1.5"])
def test_patience_is_a_positive_number_of_epochs(patience: str) -> None:
    from syncbn.errors import ConfigError

    with pytest.raises(ConfigError, match="patience"):
        compose_config([f"patience={patience}"])
