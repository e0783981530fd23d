import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from syncbn.train.run import status as module
from syncbn.train.run.status import Phase, Reporter, Status, read_status, write_status
from tests.support.jobs import wait_until

BEGUN = Status(attempt=2, started=100.0, updated=100.0, epochs=10)


def _phase(directory: Path) -> str | None:
    status = read_status(directory)
    return None if status is None else status.phase


def test_status_says_how_far_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Reporter(tmp_path, BEGUN) as reporter:
        reporter.begin(step=10, total_steps=120, epoch=0.5)
        for step in (11, 12, 13):
            now += 2
            reporter.note(step, epoch=step / 12, images_per_s=900.0)
        reporter.enter(Phase.EVALUATING)
        wait_until(lambda: _phase(tmp_path) == "evaluating")
        said = json.loads((tmp_path / "status.json").read_text())
    assert said.pop("updated") > 1e9
    assert said == {
        "attempt": 2,
        "phase": "evaluating",
        "step": 13,
        "total_steps": 120,
        "epoch": 13 / 12,
        "epochs": 10,
        "images_per_s": 900.0,
        "time_left_s": 107 * 2.0,
        "started": 100.0,
        "restarts": 0,
    }
    assert _phase(tmp_path) == "done"


def test_first_step_tells_nothing_of_the_pace_and_the_last_leaves_none(tmp_path: Path) -> None:
    with Reporter(tmp_path, BEGUN) as reporter:
        reporter.begin(step=0, total_steps=2, epoch=0.0)
        reporter.note(1, 0.5, 1.0)
        wait_until(lambda: (read := read_status(tmp_path)) is not None and read.step == 1)
        assert _left(tmp_path) is None
        reporter.note(2, 1.0, 1.0)
    assert _left(tmp_path) is None


def _left(directory: Path) -> float | None:
    status = read_status(directory)
    assert status is not None
    return status.time_left_s


def test_status_goes_back_to_what_the_run_did(tmp_path: Path) -> None:
    with Reporter(tmp_path, BEGUN) as reporter:
        reporter.enter(Phase.EXPORTING)
        with reporter.during(Phase.EVALUATING):
            wait_until(lambda: _phase(tmp_path) == "evaluating")
        wait_until(lambda: _phase(tmp_path) == "exporting")


def test_status_of_a_run_that_fails_says_what_it_did(tmp_path: Path) -> None:
    def fail() -> None:
        with Reporter(tmp_path, BEGUN) as reporter:
            reporter.enter(Phase.RECALIBRATING)
            raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        fail()
    assert _phase(tmp_path) == "recalibrating"


def test_full_disk_is_said_once_and_leaves_the_status_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_status(tmp_path, BEGUN)
    tries = 0

    def fail(directory: Path, status: Status) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_status", fail)
    with Reporter(tmp_path, BEGUN) as reporter:
        for phase in (Phase.TRAINING, Phase.EVALUATING):
            before = tries
            reporter.enter(phase)
            wait_until(lambda before=before: tries > before)
    assert caplog.messages == ["cannot write status.json: No space left on device"]
    assert read_status(tmp_path) == BEGUN


def test_status_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_status(tmp_path, BEGUN)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_tell_nobody(tmp_path: Path) -> None:
    before = threading.active_count()
    with Reporter(None, BEGUN) as reporter:
        reporter.enter(Phase.TRAINING)
        assert threading.active_count() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1", "{}", '{"attempt": 1}', '{"attempt": "1", "started": 1, "updated": 1}'],
)
def test_damaged_status_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None


def test_status_of_a_later_version_is_read(tmp_path: Path) -> None:
    said: dict[str, Any] = {"attempt": 3, "started": 1.0, "updated": 2.0, "host": "x"}
    (tmp_path / "status.json").write_text(json.dumps(said))
    assert read_status(tmp_path) == Status(3, 1.0, 2.0)
