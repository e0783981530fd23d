import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from syncbn.errors import ConfigError
from syncbn.train.config import compose_config
from syncbn.train.run import directory
from syncbn.train.run.directory import Result, RunDirectory, open_run_directory
from syncbn.train.schema import TrainConfig


def _config(root: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    return compose_config([f"run_root={root}", *overrides])


def test_every_run_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    paths = {open_run_directory(_config(tmp_path)).path for _ in range(20)}
    assert len(paths) == 20
    assert {path.parent for path in paths} == {tmp_path}


def test_resolved_config_is_written_and_read_back(tmp_path: Path) -> None:
    config = _config(tmp_path, ["norm=none", "optim.lr=0.3"])
    assert open_run_directory(config).read_config() == config


def test_named_directory_is_resumed_by_the_same_job_alone(tmp_path: Path) -> None:
    named = f"run_dir={tmp_path / 'run'}"
    first = open_run_directory(_config(tmp_path, [named]))
    assert open_run_directory(_config(tmp_path, [named])) == first
    for override, difference in (
        ("seed=5", "seed=5"),
        ("optim.momentum=0.1", "optim.momentum=0.1"),  # a value that norm.momentum has too
        ("norm=none", "norm.name=none"),
    ):
        with pytest.raises(ConfigError, match=rf"this one has {difference}; choose another"):
            open_run_directory(_config(tmp_path, [named, override]))
    elsewhere = [f"run_dir={os.path.relpath(tmp_path / 'run')}", "run_root=elsewhere"]
    assert open_run_directory(_config(tmp_path, [*elsewhere, "launch.nproc=5"])) == first
    assert first.read_config().launch.nproc == 5
    first.write_result(Result("failed", "why", {}, 1.0, 1))
    open_run_directory(_config(tmp_path, [named]))
    assert first.read_result() is None
    first.write_result(Result("finished", None, {"test_accuracy": 0.5}, 1.0, 0))
    with pytest.raises(ConfigError, match="holds a finished run"):
        open_run_directory(_config(tmp_path, [named]))


def test_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists and is not a run directory"):
        open_run_directory(_config(tmp_path, [f"run_dir={tmp_path}"]))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_directory_is_taken(tmp_path: Path) -> None:
    run = open_run_directory(_config(tmp_path, [f"run_dir={tmp_path}"]))
    assert (run.path, run.config_file.exists()) == (tmp_path, True)


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make the run directory .*file/run"):
        open_run_directory(_config(tmp_path, [f"run_dir={tmp_path / 'file' / 'run'}"]))


@pytest.mark.parametrize("content", [b"", b"a: [", b"- 1\n", b"\xff", b"name: x\n", b"data: 1\n"])
def test_damaged_config_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    config = _config(tmp_path, [f"run_dir={tmp_path / 'run'}"])
    run = open_run_directory(config)
    run.config_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*run/config.yaml: "):
        open_run_directory(config)


def test_directory_in_use_is_refused_until_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_LOCK_TIMEOUT_S", 0.1)
    run = RunDirectory(tmp_path)
    with run.lock(), pytest.raises(ConfigError, match="another job is training in"):
        RunDirectory(tmp_path).lock().__enter__()
    with run.lock():
        pass


def test_lines_are_kept_up_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_metrics() == []
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 0.5})
        run.append_step({"step": step})
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut short by a kill
    run.forget_after(2)
    assert run.read_metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert run.steps_file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_restarted_job_finds_the_directory_of_its_first_attempt(tmp_path: Path) -> None:
    first = open_run_directory(_config(tmp_path), "host 1 2 job")
    assert open_run_directory(_config(tmp_path), "host 1 2 job") == first
    assert open_run_directory(_config(tmp_path), "host 1 3 job") != first
    assert open_run_directory(_config(tmp_path)) != first


def test_result_is_read_back_and_damage_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_result() is None
    result = Result("interrupted", "stopped by SIGTERM", {"test_loss": 1.0}, 2.5, 143)
    run.write_result(result)
    assert run.read_result() == result
    run.result_file.write_text('{"status": "fin')
    assert run.read_result() is None


def test_trackers_know_a_run_by_the_same_name_each_time(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path).tracker_id()
    assert RunDirectory(tmp_path).tracker_id() == first
    (tmp_path / "other").mkdir()
    assert RunDirectory(tmp_path / "other").tracker_id() != first
