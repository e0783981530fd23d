import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from syncbn.errors import ConfigError
from syncbn.train.changes import compose_job
from syncbn.train.config import compose_config
from syncbn.train.launch.protocol import Request, send_request
from syncbn.train.run import lock
from syncbn.train.run.directory import Result, RunDirectory, open_run, open_run_directory
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


def test_named_directory_goes_on_with_its_own_job_alone(tmp_path: Path) -> None:
    named = f"run_dir={tmp_path / 'run'}"
    first = open_run_directory(_config(tmp_path, [named]))
    assert open_run_directory(_config(tmp_path, [named])) == first
    written = first.config_file.read_text()
    for override, difference in (
        ("seed=5", r"seed=5 \(was 0\)"),
        ("optim.momentum=0.1", r"optim.momentum=0.1 \(was 0.9\)"),
        ("norm=none", r"norm.name=none \(was sync\)"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot go on with {difference}.*choose another"):
            open_run_directory(_config(tmp_path, [named, override]))
    assert first.config_file.read_text() == written
    elsewhere = [f"run_dir={os.path.relpath(tmp_path / 'run')}", "run_root=elsewhere"]
    assert open_run_directory(_config(tmp_path, [*elsewhere, "launch.nproc=5"])) == first
    assert first.read_config().launch.nproc == 5
    assert "INFO going on with run_root=elsewhere" in first.log_file.read_text()
    first.write_result(Result("failed", "why", {}, 1.0, 1))
    open_run_directory(_config(tmp_path, [named]))
    assert first.read_result() is None


def test_directory_alone_goes_on_with_what_it_has(tmp_path: Path) -> None:
    typed = [f"run_dir={tmp_path / 'run'}"]
    with open_run(_config(tmp_path, [*typed, "norm=local", "optim.lr=0.5"])):
        pass
    with open_run(compose_config(typed), typed) as opened:  # by torchrun, or in a sweep
        assert opened.config.norm.name == "local"
        assert opened.config.optim.lr == 0.5
        assert opened.changes == ()
    typed += ["epochs=20", "optim.lr=0.25"]
    with open_run(compose_config(typed), typed) as opened:
        assert opened.changes == ("epochs=20 (was 12)", "optim.lr=0.25 (was 0.5)")
        assert opened.directory.read_config() == opened.config


@pytest.mark.parametrize(
    ("typed", "adds"),
    [
        ([], False),
        (["epochs=12"], False),
        (["epochs=11"], False),
        (["epochs=13"], True),
        (["epochs=13", "max_steps=100"], False),
        (["epochs=13", "max_steps=1000"], True),
        (["max_steps=1000"], False),
        (["optim.lr=0.01"], False),
        (["recalibrate=true"], True),
        (["publish=models"], True),
    ],
)
def test_finished_run_goes_on_if_there_is_something_to_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], adds: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run_directory(_config(tmp_path, ["run_dir=run"]))
    run.append_metrics({"epoch": 12, "step": 500})
    finished = run.write_result(Result("finished", None, {"test_accuracy": 0.5}, 1.0, 0))
    typed = [*typed, "run_dir=run"]
    if adds:
        open_run(compose_job(typed), typed).lock.close()
        assert run.read_result() is None
        return
    with pytest.raises(ConfigError, match=r"holds a finished run; .*: more than epochs=12, or "):
        open_run(compose_job(typed), typed)
    assert run.read_result() == finished


def test_run_that_max_steps_ended_goes_on_with_more_of_them(tmp_path: Path) -> None:
    named = [f"run_dir={tmp_path / 'run'}", "max_steps=100"]
    run = open_run_directory(compose_config(named))
    run.append_metrics({"epoch": 3, "step": 100})
    run.write_result(Result("finished", None, {}, 1.0, 0))
    for more in ("max_steps=100", "epochs=50", "max_steps=50"):
        typed = [named[0], more]
        with pytest.raises(ConfigError, match="more than max_steps=100, or another"):
            open_run(compose_job(typed), typed)
    typed = [named[0], "max_steps=null"]
    open_run(compose_job(typed), typed).lock.close()
    assert run.read_result() is None


def test_run_that_max_steps_ended_in_its_last_epoch_needs_more_epochs(tmp_path: Path) -> None:
    # The epoch has ended with its last step, though not with its last sample.
    named = [f"run_dir={tmp_path / 'run'}", "max_steps=100", "epochs=3"]
    run = open_run_directory(compose_config(named))
    run.append_metrics({"epoch": 3, "step": 100})
    run.write_result(Result("finished", None, {}, 1.0, 0))
    typed = [named[0], "max_steps=110"]
    with pytest.raises(ConfigError, match="more than both epochs=3 and max_steps=100, or another"):
        open_run(compose_job(typed), typed)
    typed += ["epochs=4"]
    open_run(compose_job(typed), typed).lock.close()
    assert run.read_result() is None


def test_run_that_lost_patience_needs_more_of_it(tmp_path: Path) -> None:
    named = [f"run_dir={tmp_path / 'run'}", "patience=2"]
    run = open_run_directory(compose_config(named))
    for epoch in (1, 2, 3):
        run.append_metrics({"epoch": epoch, "step": 10 * epoch, "best": float(epoch == 1)})
    run.write_result(Result("finished", None, {}, 1.0, 0))
    for more in ("epochs=20", "patience=1"):
        typed = [named[0], more]
        with pytest.raises(ConfigError, match="more than patience=2, or another publish"):
            open_run(compose_job(typed), typed)
    typed = [named[0], "patience=3"]
    open_run(compose_job(typed), typed).lock.close()
    assert run.read_result() is None


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


def test_directory_in_use_is_refused_untouched_until_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_TIMEOUT_S", 0.1)
    config = _config(tmp_path, [f"run_dir={tmp_path / 'run'}"])
    opened = open_run(config)
    run = opened.directory
    run.write_result(Result("failed", "why", {}, 1.0, 1))  # as its last act
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    config.epochs = 77
    for _ in range(2):
        with pytest.raises(ConfigError, match="; wait for its end, or choose another run_dir"):
            open_run(config)
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before
    opened.lock.close()
    open_run(config).lock.close()
    assert run.read_config().epochs == 77


def test_lock_is_held_until_the_last_process_that_has_a_part_in_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_TIMEOUT_S", 0.1)
    run = RunDirectory(tmp_path)
    held, (ours, its) = run.lock(), socket.socketpair()
    script = (
        "import socket, sys\n"
        "from syncbn.train.launch.protocol import receive_request\n"
        "connection = socket.socket(fileno=0)\n"
        "request, _ = receive_request(connection)\n"
        "assert request.run_dir == sys.argv[1]\n"
        "print('has it', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=its.fileno(), stdout=subprocess.PIPE) as other, ours, its:
        send_request(ours, Request(str(tmp_path), "/"), [held.fileno()])
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        held.close()
        with pytest.raises(ConfigError, match="another job is training in"):
            run.lock()
        other.kill()
        other.wait()
        run.lock().close()


def test_children_of_a_rank_do_not_hold_the_lock(tmp_path: Path) -> None:
    held = RunDirectory(tmp_path).lock()
    held.keep_from_children()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    held.close()
    RunDirectory(tmp_path).lock().close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_directory_that_a_killed_launcher_left_empty_is_taken(tmp_path: Path) -> None:
    for name in (".lock", "config.yaml.tmp"):
        (tmp_path / name).touch()
    run = open_run_directory(_config(tmp_path, [f"run_dir={tmp_path}"]))
    assert run.config_file.exists()


def test_damaged_line_is_passed_over_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    damaged = b'{"step": 1}\n\xff\x00\n[3]\n{"loss": 1}\n{"step": 2}\n{"step": 3\n'
    damaged += b'{"step": 3, "epoch": "1"}\n'
    run.metrics_file.write_bytes(damaged)
    run.forget_after(5, epochs=1)
    assert caplog.messages == [f"{run.metrics_file}: passed over damaged lines 2, 3, 4, 6, 7"]
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    assert len(caplog.messages) == 1


def test_lines_are_kept_up_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_metrics() == []
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 0.5})
        run.append_step({"step": step})
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut short by a kill
    run.forget_after(2, epochs=1)
    assert run.read_metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert run.steps_file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_line_of_an_epoch_without_the_checkpoint_of_its_end_is_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for epoch, step in ((1, 3), (2, 6)):
        run.append_metrics({"epoch": epoch, "step": step})
        run.append_step({"epoch": epoch, "step": step})
    run.forget_after(6, epochs=1)  # of a checkpoint after step 6, before the evaluation
    assert run.read_metrics() == [{"epoch": 1, "step": 3}]
    assert len(run.steps_file.read_text().splitlines()) == 2


def test_restarted_job_finds_the_directory_of_its_first_attempt(tmp_path: Path) -> None:
    def open_for(starter: str) -> RunDirectory:
        with open_run(_config(tmp_path), [f"run_root={tmp_path}"], starter) as opened:
            return opened.directory

    first = open_for("host 1 2 job")
    assert open_for("host 1 2 job") == first
    assert open_for("host 1 3 job") != first
    assert open_run_directory(_config(tmp_path)) != first


def test_result_is_read_back_and_damage_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_result() is None
    said = Result("interrupted", "stopped by SIGTERM", {"test_loss": 1.0}, 2.5, 143)
    result = run.write_result(said)
    assert run.read_result() == result
    assert (result.status, result.error, result.reason) == ("interrupted", said.error, "stopped")
    assert (result.metrics, result.duration_s) == (said.metrics, said.duration_s)
    run.result_file.write_text('{"status": "fin')
    assert run.read_result() is None


def test_trackers_know_a_run_by_the_same_name_each_time(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path).tracker_id()
    assert RunDirectory(tmp_path).tracker_id() == first
    (tmp_path / "other").mkdir()
    assert RunDirectory(tmp_path / "other").tracker_id() != first
