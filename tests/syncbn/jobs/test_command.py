"""The command that dispatches: its options, its end, and that it is the only one."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from syncbn.jobs.dispatch.claim import Claim
from syncbn.jobs.dispatch.command import main
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.store.store import Store
from tests.support.jobs import wait_until
from tests.support.processes import REPOSITORY

_CORES = len(os.sched_getaffinity(0))


@contextmanager
def dispatching(directory: Path, *options: str) -> Generator["subprocess.Popen[bytes]"]:
    """Run the command; kill it in the end, if it is there still."""
    with (directory.parent / "dispatcher.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "syncbn.jobs.dispatch.command", str(directory), *options],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stderr=output,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def is_ready(directory: Path) -> bool:
    store = Store(directory)
    try:
        return store.dispatcher() is not None
    finally:
        store.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--cores", "0"], "--cores: must be a whole number from 1 on, got 0"),
        (["--cores", "two"], "--cores: must be a whole number from 1 on, got two"),
        (["--cores", "1.5"], "must be a whole number from 1 on, got 1.5"),
        (["--gpus", "-1"], "--gpus"),
        (["--jobs-per-gpu", "0"], "must be a whole number from 1 on, got 0"),
        (["--engine", "cloud"], "invalid choice: 'cloud'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_option_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *options])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_more_cores_than_there_are_must_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--cores", str(_CORES + 1)])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"syncbn-dispatch: --cores {_CORES + 1}: this process may use {_CORES}" in said
    assert "add --oversubscribe to have jobs share them" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engine", "slurm"], "sbatch, squeue, scancel not found; install Slurm's commands"),
        (["--engine", "ray"], "with --ray-address http://HOST:8265 or the variable RAY_ADDRESS"),
        (["--engine", "ray", "--ray-address", "head:6379"], "head:6379: must be as http://HOST"),
    ],
)
def test_cluster_that_cannot_be_reached_this_way_is_refused_at_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    why: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *options])
    assert ended.value.code == 1
    assert why in capsys.readouterr().err


def test_second_dispatcher_says_who_has_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = Claim(tmp_path, "local")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    claim.close()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"syncbn-dispatch: {tmp_path} has a dispatcher already: process {os.getpid()}" in said


@pytest.mark.parametrize(
    ("content", "why"),
    [("[limits]\nwaiting = 3\n", "unknown key limits.waiting"), ("[", "is no TOML")],
)
def test_wrong_settings_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, why: str
) -> None:
    (tmp_path / "settings.toml").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 1
    assert why in capsys.readouterr().err
    Claim(tmp_path, "local").close()  # nothing keeps the store


def test_dispatcher_that_is_told_to_end_does_and_the_next_has_the_store(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    cores = _CORES + 2
    with dispatching(jobs, "--cores", str(cores), "--oversubscribe", "--gpus", "0") as first:
        wait_until(lambda: is_ready(jobs), 120)
        store = Store(jobs)
        about = store.dispatcher()
        assert about is not None
        assert (about.pid, about.engine, about.cores) == (first.pid, "local", cores)
        assert about.free_cores == cores
        (job,) = store.submit([JobSpec(name="job", nproc=cores + 1)], owner="anna")
        wait_until(lambda: store.get(job.id).reason_code == "too_large")
        store.close()
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
    with dispatching(jobs, "--until-stdin-closes") as second:
        wait_until(lambda: f"process {second.pid} on" in (jobs / "dispatcher.lock").read_text(), 60)
        assert second.stdin is not None
        second.stdin.close()
        assert second.wait(60) == 0
    assert "Traceback" not in (tmp_path / "dispatcher.log").read_text()
