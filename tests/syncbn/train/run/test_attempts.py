import errno
import json
import os
from pathlib import Path

import pytest

from syncbn.train.config import compose_config
from syncbn.train.run import attempts, files
from syncbn.train.run import result as results
from syncbn.train.run.directory import Result, RunDirectory, open_run, open_run_directory
from syncbn.train.run.status import Status, write_status

FAILED = Result("failed", "why", {}, 0, 1)
BEST = {"epoch": 2, "step": 20, "val_accuracy": 0.5, "best": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has begun, and come to its third epoch."""
    run = _open(tmp_path)
    run.begin_attempt(12)
    for line in ({**BEST, "epoch": 1, "step": 10}, BEST, {**BEST, "epoch": 3, "best": 0.0}):
        run.append_metrics({**line, "time": 1.0})
    return run


def _open(directory: Path) -> RunDirectory:
    return open_run_directory(compose_config([f"run_dir={directory / 'run'}"]))


def _said(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(each.attempt, each.status, each.reason) for each in run.read_attempts()]


def test_attempt_that_failed_says_which_it_was_and_when_and_its_best_metrics(
    run: RunDirectory,
) -> None:
    begun = run.read_status()
    assert begun is not None
    result = run.write_result(FAILED)
    assert run.read_result() == result
    assert (result.attempt, result.started) == (1, begun["started"])
    assert result.metrics == BEST
    assert result.ended is not None
    assert result.started is not None
    assert result.duration_s == result.ended - result.started
    assert result.ended >= result.started


def test_attempts_are_kept_in_their_order(run: RunDirectory, tmp_path: Path) -> None:
    assert _said(run) == []
    run.write_result(FAILED)
    assert _said(run) == [(1, "failed", "internal")]
    _open(tmp_path).begin_attempt(12)
    assert _said(run) == [(1, "failed", "internal")]
    assert run.read_result() is None
    run.write_result(Result("interrupted", "stopped by SIGTERM", {}, 2.5, 143))
    assert _said(run) == [(1, "failed", "internal"), (2, "interrupted", "stopped")]
    _open(tmp_path).begin_attempt(12)
    run.write_result(Result("finished", None, {"test_loss": 1.0}, 2.5, 0))
    assert [attempt for attempt, _, _ in _said(run)] == [1, 2, 3]


def test_attempt_that_left_no_word_is_kept_as_lost(run: RunDirectory, tmp_path: Path) -> None:
    write_status(run.path, Status(1, 100.0, 130.0, phase="evaluating", step=30))
    _open(tmp_path)
    (lost,) = run.read_attempts()
    assert (lost.attempt, lost.status, lost.reason) == (1, "lost", "killed")
    assert lost.error == "killed while evaluating, after step 30: it left no result"
    assert (lost.started, lost.ended, lost.duration_s) == (100.0, 130.0, 30.0)
    assert lost.metrics == BEST
    assert run.begin_attempt(12).attempt == 2


def test_opening_a_directory_again_before_anything_begins_is_no_attempt(tmp_path: Path) -> None:
    run = _open(tmp_path)
    _open(tmp_path)
    assert run.begin_attempt(12).attempt == 1
    assert _said(run) == []


def test_ranks_that_are_started_again_are_the_same_attempt(run: RunDirectory) -> None:
    begun = run.read_status()
    with attempts.report_attempt(run.path, 12) as reporter:
        reporter.begin(5, 100, 0.5)
    with attempts.report_attempt(run.path, 12):
        pass
    status = run.read_status()
    assert begun is not None
    assert status is not None
    assert (status["attempt"], status["started"]) == (1, begun["started"])
    assert (status["step"], status["total_steps"]) == (5, 100)


def test_attempt_that_nobody_began_begins_with_its_first_report(tmp_path: Path) -> None:
    run = _open(tmp_path)
    with attempts.report_attempt(run.path, 7):
        status = run.read_status()
        assert status is not None
        assert (status["attempt"], status["phase"], status["epochs"]) == (1, "loading", 7)


@pytest.mark.parametrize("left", ["a result", "nothing"])
@pytest.mark.parametrize("killed_at", range(5))
def test_attempt_counts_once_wherever_keeping_it_is_killed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, left: str, killed_at: int
) -> None:
    if left == "a result":
        run.write_result(FAILED)
    expected = ("failed", "internal") if left == "a result" else ("lost", "killed")
    changes = 0

    def counted(function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal changes
            changes += 1
            if changes > killed_at:
                raise KeyboardInterrupt
            assert callable(function)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as killing:
        for name in ("replace", "unlink"):
            killing.setattr(Path, name, counted(getattr(Path, name)))
        try:
            run.keep_attempt()
        except KeyboardInterrupt:
            assert len(run.read_attempts()) == (1 if left == "a result" or killed_at else 0)
    for _ in range(2):
        run.keep_attempt()
        assert _said(run) == [(1, *expected)]
    assert sorted(file.name for file in run.path.iterdir() if "json" in file.name) == [
        "attempts.jsonl",
        "metrics.jsonl",
    ]


def test_result_of_an_earlier_version_is_the_first_attempt(tmp_path: Path) -> None:
    run = _open(tmp_path)
    old = {"status": "interrupted", "error": "x", "metrics": {}, "duration_s": 3, "exit_code": 143}
    run.result_file.write_text(json.dumps(old))
    (first,) = run.read_attempts()
    assert (first.attempt, first.reason, first.started) == (1, "stopped", None)
    _open(tmp_path)
    assert _said(run) == [(1, "interrupted", "stopped")]
    assert run.begin_attempt(12).attempt == 2


def test_damaged_line_of_attempts_is_passed_over_and_kept(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    file = run.path / "attempts.jsonl"
    file.write_bytes(b'{"status": "fin\n\xff\n')
    run.write_result(FAILED)
    run.keep_attempt()
    assert _said(run) == [(1, "failed", "internal")]
    assert "attempts.jsonl: passed over damaged lines 1, 2" in caplog.messages
    assert file.read_text(errors="replace").splitlines()[0] == '{"status": "fin'


def test_line_that_was_cut_short_does_not_swallow_the_next(run: RunDirectory) -> None:
    (run.path / "attempts.jsonl").write_text('{"status": "fin')
    run.write_result(FAILED)
    run.keep_attempt()
    assert _said(run) == [(1, "failed", "internal")]


def test_directory_of_a_job_that_was_refused_is_taken_once_it_is_right(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.write_result(FAILED)  # of a sweep's job that could not be composed
    with open_run(compose_config([f"run_dir={run.path}"])) as opened:
        assert opened.directory == run
        assert _said(run) == [(1, "failed", "internal")]
    assert run.read_result() is None


def test_full_disk_leaves_the_result_where_it_is(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_result(FAILED)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        run.keep_attempt()
    assert _said(run) == [(1, "failed", "internal")]
    assert run.result_file.exists()


def test_result_takes_the_room_of_the_status_on_a_full_disk(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(file: Path, content: str) -> None:
        if (run.path / "status.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        files.replace_file(file, content)

    monkeypatch.setattr(results, "replace_file", replace)
    written = run.write_result(FAILED)
    assert written.attempt == 1
    assert run.read_result() == written
    assert run.read_status() is None


def test_result_leaves_the_status_where_it_is_not_the_room_that_is_missing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(file: Path, content: str) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(results, "replace_file", replace)
    with pytest.raises(OSError, match="Permission"):
        run.write_result(FAILED)
    assert run.read_status() is not None
