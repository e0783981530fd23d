import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from syncbn.train.config import compose_config
from syncbn.train.run import tracking
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.tracking import NoTracker, WandbTracker, start_tracker


class _Broken:
    dir = "nowhere"

    def log(self, *args: object, **kwargs: object) -> None:
        raise OSError("connection lost")

    finish = log


@pytest.mark.parametrize("override", ["track=none", "track.mode=disabled"])
def test_none_tracks_nothing(tmp_path: Path, override: str) -> None:
    tracker = start_tracker(compose_config([override]), RunDirectory(tmp_path))
    tracker.log(1, {"loss": 1.0})
    tracker.finish(None)
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
        "from syncbn.train.run.directory import RunDirectory;"
        "from syncbn.train.run.tracking import start_tracker;"
        "config = compose_config(['optim.lr=0.125', 'sweep_dir=runs/lr-sweep']);"
        "tracker = start_tracker(config, RunDirectory(pathlib.Path(sys.argv[1])));"
        "tracker.log(44, {'test_accuracy': 0.75, 'lr': 0.125}); tracker.finish(None)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    shown = subprocess.run(leet, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "0.75" in shown
    assert "0.125" in shown
    assert "lr-sweep" in shown
    assert (tmp_path / "tracker_id").read_text() in record.name
    assert json.loads(shown.splitlines()[0])


def test_tracker_that_fails_to_start_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: object) -> None:
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = start_tracker(compose_config([]), RunDirectory(tmp_path))
    tracker.log(1, {"loss": 1.0})
    tracker.finish(None)
    assert "wandb failed, the run goes on without it: no API key" in caplog.text


@pytest.mark.parametrize("calls", [("log", "finish"), ("finish",)])
def test_tracker_that_fails_later_is_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls: tuple[str, ...],
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **kwargs: _Broken())  # pyright: ignore[reportUnknownArgumentType] -- stands in for a run
    tracker = start_tracker(compose_config([]), RunDirectory(tmp_path))
    assert isinstance(tracker, WandbTracker)
    if "log" in calls:
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
    tracker.finish(None)
    assert caplog.text.count("connection lost") == 1


def test_server_that_does_not_answer_delays_nothing_but_the_end_a_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **kwargs: answer.wait(60))  # pyright: ignore[reportUnknownArgumentType] -- stands in for a run
    monkeypatch.setattr(tracking, "_LATE_TIMEOUT_S", 0.1)
    started = time.monotonic()
    tracker = start_tracker(compose_config(["track.mode=online"]), RunDirectory(tmp_path))
    tracker.log(1, {"loss": 1.0})
    tracker.finish(tmp_path)
    assert time.monotonic() - started < 30
    assert "wandb has not finished in time" in caplog.text
    answer.set()


def test_online_run_can_be_resumed_and_gets_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    run = _Recording()

    def start(**kwargs: Any) -> _Recording:
        asked.update(kwargs)
        return run

    monkeypatch.setattr(wandb, "init", start)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    tracker = start_tracker(compose_config(["track.mode=online"]), RunDirectory(tmp_path))
    tracker.log(3, {"loss": 1.0})
    tracker.finish(tmp_path / "bundle")
    assert (asked["mode"], asked["resume"]) == ("online", "allow")
    assert asked["id"] == RunDirectory(tmp_path).tracker_id()
    assert run.calls == [("log", 3), ("artifact", "digits-cnn"), ("finish", None)]


class _Recording:
    dir = "somewhere"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def log(self, metrics: object, step: int) -> None:
        self.calls.append(("log", step))

    def log_artifact(self, artifact: Any) -> None:
        self.calls.append(("artifact", artifact.name))

    def finish(self) -> None:
        self.calls.append(("finish", None))
