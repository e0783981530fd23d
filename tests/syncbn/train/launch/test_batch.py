"""What batch systems start: it looks at its permit, heeds SIGTERM, and sets what it needs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syncbn.errors import ConfigError
from syncbn.jobs.workspace import Workspace
from syncbn.train.changes import compose_job
from syncbn.train.launch import batch
from syncbn.train.launch.permit import check_own_permit
from syncbn.train.run.directory import RunDirectory, open_run
from tests.support.jobs import SMALL, wait_until
from tests.support.processes import REPOSITORY

_TIMEOUT_S = 120


def _run_of(directory: Path, *overrides: str) -> RunDirectory:
    typed = [*SMALL, "epochs=1", *overrides, f"run_dir={directory / 'run'}"]
    with open_run(compose_job(typed), typed) as opened:
        return opened.directory


def _start(run: RunDirectory) -> "subprocess.Popen[bytes]":
    with (run.path.parent / "output").open("wb") as output:
        return subprocess.Popen(
            _command(run),
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _command(run: RunDirectory) -> list[str]:
    permit = run.path.parent / "attempt"
    return [
        *(sys.executable, "-m", "syncbn.train.launch.batch", str(run.path)),
        *("--attempt", "1", "--permit", str(permit), "1", "--threads", "1"),
        *("--console", str(run.path.parent / "console.log")),
    ]


def _files(run: RunDirectory) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in run.path.rglob("*")}


def test_attempt_without_a_permit_leaves_everything_alone(tmp_path: Path) -> None:
    run = _run_of(tmp_path)
    (tmp_path / "attempt").write_text("2\n")
    before = _files(run)
    assert _start(run).wait(_TIMEOUT_S) == 2
    assert "the time of this attempt is over" in (tmp_path / "output").read_text()
    assert _files(run) == before
    assert not (tmp_path / "console.log").exists()


def test_sigterm_that_comes_while_it_loads_is_heeded(tmp_path: Path) -> None:
    run = _run_of(tmp_path)
    (tmp_path / "attempt").write_text("1\n")
    process = _start(run)
    blocked = Path(f"/proc/{process.pid}/status")

    def is_blocked() -> bool:
        (mask,) = [line for line in blocked.read_text().splitlines() if line.startswith("SigBlk")]
        return bool(int(mask.split()[1], 16) & 1 << signal.SIGTERM - 1)

    wait_until(is_blocked, _TIMEOUT_S)
    process.terminate()
    assert process.wait(_TIMEOUT_S) == 128 + signal.SIGTERM
    result = run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("interrupted", "stopped")
    assert (tmp_path / "console.log").read_text().startswith("=== attempt 1, ")


def test_it_stops_when_the_process_ends_that_started_it(tmp_path: Path) -> None:
    run = _run_of(tmp_path, "epochs=10000")
    (tmp_path / "attempt").write_text("1\n")
    command = [*_command(run), "--with-parent"]
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code, *command], stdin=subprocess.DEVNULL)
    wait_until(lambda: len(run.read_metrics()) >= 1, _TIMEOUT_S)
    parent.kill()
    parent.wait()
    wait_until(lambda: not Workspace(tmp_path).is_held(), _TIMEOUT_S)
    result = run.read_result()
    assert result is not None
    assert result.status == "interrupted"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What this process would become; its environment is as before afterwards."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    return commands


def _be_one_of_two(directory: Path, node: int) -> None:
    strange = directory / "it's a, $(strange) = place"
    arguments = [str(strange), "--attempt", "7", "--permit", "FILE", "7", "--threads", "3"]
    arguments += ["--nodes", "2", "--node-rank", str(node), "--ranks", "4"]
    with pytest.raises(SystemExit):
        batch.main([*arguments, "--master-addr", "host-a", "--master-port", "20042"])


def test_one_of_several_machines_becomes_torchrun(
    executed: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["CLUSTER_API_KEY"] = "secret"
    _be_one_of_two(tmp_path, 1)
    (command,) = executed
    assert command[1:8] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "--nproc-per-node=4"),
        *("--master-addr=host-a", "--master-port=20042"),
    ]
    typed = command[command.index("syncbn.train") + 1 :]
    config = compose_job(typed)
    assert config.run_dir == str(tmp_path / "it's a, $(strange) = place")
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "CLUSTER_API_KEY" not in os.environ
    assert capsys.readouterr().out == ""  # the first one begins the attempt, for all


def test_first_of_several_machines_begins_the_attempt(
    executed: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _be_one_of_two(tmp_path, 0)
    assert capsys.readouterr().out.startswith("=== attempt 7, ")


def test_run_is_opened_for_an_attempt_with_a_permit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run_of(tmp_path)
    (run.path / "result.json").write_text("{}")
    before = _files(run)
    permit = tmp_path / "attempt"
    monkeypatch.setenv("SYNCBN_PERMIT_FILE", str(permit))
    monkeypatch.setenv("SYNCBN_PERMIT_TEXT", "1")
    for text in ("0\n", "12\n"):
        permit.write_text(text)
        with pytest.raises(ConfigError, match="the time of this attempt is over"):
            _open(run)
    assert _files(run) == before
    permit.write_text("1\n")
    _open(run)
    assert not (run.path / "result.json").exists()


def _open(run: RunDirectory) -> Any:
    config = run.read_config()
    open_run(config, [], check=check_own_permit).lock.close()
