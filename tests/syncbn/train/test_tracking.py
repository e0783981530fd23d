import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from syncbn.train.config import compose_config
from syncbn.train.tracking import NoTracker, WandbTracker, start_tracker


class _Broken:
    dir = "nowhere"

    def log(self, *args: object, **kwargs: object) -> None:
        raise OSError("connection lost")

    finish = log


def test_none_tracks_nothing(tmp_path: Path) -> None:
    tracker = start_tracker(compose_config(["track=none"]), tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert isinstance(tracker, NoTracker)
    assert list(tmp_path.iterdir()) == []


def test_offline_run_holds_config_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    # In a process of its own, as wandb starts threads and a service that outlive a test.
    code = (
        "import pathlib, sys; from syncbn.train.config import compose_config;"
        "from syncbn.train.tracking import start_tracker;"
        "tracker = start_tracker(compose_config(['optim.lr=0.125']), pathlib.Path(sys.argv[1]));"
        "tracker.log(44, {'test_accuracy': 0.75, 'lr': 0.125}); tracker.finish()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    shown = subprocess.run(leet, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "0.75" in shown
    assert "0.125" in shown
    assert json.loads(shown.splitlines()[0])


def test_tracker_that_fails_to_start_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: object) -> None:
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", fail)
    assert isinstance(start_tracker(compose_config([]), tmp_path), NoTracker)
    assert "failed to start, the run goes on without it: no API key" in caplog.text


def test_tracker_that_fails_later_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **kwargs: _Broken())  # pyright: ignore[reportUnknownArgumentType] -- stands in for a run
    tracker = start_tracker(compose_config([]), tmp_path)
    assert isinstance(tracker, WandbTracker)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish()
    assert caplog.text.count("connection lost") == 1


def test_tracker_that_fails_to_finish_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **kwargs: _Broken())  # pyright: ignore[reportUnknownArgumentType] -- stands in for a run
    start_tracker(compose_config([]), tmp_path).finish()
    assert "failed to finish: connection lost" in caplog.text
