"""One fork server for many jobs, and what becomes of them if it, or who started it, dies."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from syncbn.errors import ConfigError, TrainingError
from syncbn.train.changes import compose_job
from syncbn.train.launch.client import VARIABLE, ForkServer
from syncbn.train.launch.protocol import Request, receive, receive_request, send, send_request
from syncbn.train.run.checkpoint import checkpoint_files
from syncbn.train.run.directory import RunDirectory, open_run
from tests.support.jobs import SMALL, children, is_alive, wait_until
from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

_TELL = "SYNCBN_TEST_TELL"
SHORT = (
    "data=synthetic",
    "data.samples=16",
    "data.test_samples=4",
    "data.size=8",
    "launch.nproc=1",
    "max_steps=1",
)


def make_telling(in_channels: int, num_classes: int) -> nn.Module:
    """Return a model, after telling what its process has."""
    told = {
        "environment": dict(os.environ),
        "cores": sorted(os.sched_getaffinity(0)),
        "cwd": str(Path.cwd()),
    }
    Path(os.environ[_TELL]).write_text(json.dumps(told))
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def _prepare(run_dir: Path, *overrides: str) -> RunDirectory:
    """Do what a dispatcher does before it starts a job."""
    small = SMALL[1:] if "model=custom" in overrides else SMALL
    typed = [*small, *overrides, f"run_dir={run_dir}"]
    with open_run(compose_job(typed), typed) as opened:
        return opened.directory


def _start(server: ForkServer, run: RunDirectory, **options: Any) -> int:
    return server.start(
        run.path, Path(f"{run.path}.out"), options.pop("environment", {}), **options
    )


def _wait_for_end(pid: int) -> None:
    wait_until(lambda: not is_alive(pid))


def _status(run: RunDirectory) -> str | None:
    result = run.read_result()
    return None if result is None else result.status


@pytest.fixture(scope="module")
def server() -> Generator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # for functions of this file
        patch.setenv("SYNCBN_TEST_SECRET", "of the server")
        with ForkServer() as server:
            server.share()
            del os.environ[VARIABLE]
            yield server


def _server_pid(server: ForkServer) -> int:
    process = server._process  # pyright: ignore[reportPrivateUsage] -- to kill it
    assert process is not None
    return process.pid


def _threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_job_gets_its_environment_cores_directory_and_console_and_no_secrets(
    server: ForkServer, tmp_path: Path
) -> None:
    factory = f"model.factory={__name__}:make_telling"
    run = _prepare(tmp_path / "run", *SHORT, "norm=none", "model=custom", factory)
    console = Path(f"{run.path}.out")
    console.write_text("before\n")
    # More than a pipe or a socket takes at once.
    environment = {_TELL: str(tmp_path / "told"), "LONG": "x" * 500_000}
    cores = sorted(os.sched_getaffinity(0))[-1:]
    pid = _start(
        server,
        run,
        environment=environment,
        unset=["SYNCBN_TEST_SECRET"],
        cores=cores,
        header="=== attempt 1 ===",
    )
    _wait_for_end(pid)
    assert _status(run) == "finished", console.read_text()
    told = json.loads((tmp_path / "told").read_text())
    assert environment.items() <= told["environment"].items()
    assert "SYNCBN_TEST_SECRET" not in told["environment"]
    assert (told["cores"], told["cwd"]) == (cores, str(Path.cwd()))
    lines = console.read_text().splitlines()
    assert lines[:2] == ["before", "=== attempt 1 ==="]
    assert any(line.startswith("status       finished") for line in lines)


def test_second_supervisor_of_a_run_is_refused(server: ForkServer, tmp_path: Path) -> None:
    run = _prepare(tmp_path / "run", "epochs=500", "log_every_steps=1")
    pid = _start(server, run)
    with pytest.raises(ConfigError, match="another job is training in"):
        _start(server, run)
    wait_until(run.steps_file.exists)
    os.kill(pid, signal.SIGTERM)
    _wait_for_end(pid)
    result = run.read_result()
    assert result is not None
    assert (result.status, result.exit_code) == ("interrupted", 128 + signal.SIGTERM)
    assert checkpoint_files(run.checkpoints_dir)


def test_run_without_a_configuration_fails_with_a_word(server: ForkServer, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    _wait_for_end(_start(server, run))
    result = run.read_result()
    assert result is not None
    assert (result.status, result.reason, result.exit_code) == ("failed", "config", 2)


def test_directory_that_is_gone_is_said(server: ForkServer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file or directory"):
        _start(server, RunDirectory(tmp_path / "gone"))


def test_nonsense_is_answered_and_the_server_goes_on(server: ForkServer, tmp_path: Path) -> None:
    pid = _server_pid(server)
    path = server._directory  # pyright: ignore[reportPrivateUsage] -- whoever may connect
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o700
    for said in (b"nonsense\n", b'{"run_dir": "/"}\n', b'{"run_dir": 1, "cwd": 2}\n'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path / "socket"))
            connection.sendall(said)
            answer = receive(connection)
        assert answer is not None
        assert answer["error"]
    run = _prepare(tmp_path / "run", *SHORT)
    _wait_for_end(_start(server, run))
    assert (_status(run), _server_pid(server)) == ("finished", pid)


def test_server_that_died_is_started_again(tmp_path: Path) -> None:
    with ForkServer() as server:
        first = _prepare(tmp_path / "first", *SHORT)
        supervisor = _start(server, first)
        dead = _server_pid(server)
        os.kill(dead, signal.SIGKILL)
        second = _prepare(tmp_path / "second", *SHORT)
        _wait_for_end(_start(server, second))
        assert _server_pid(server) != dead
        _wait_for_end(supervisor)
    assert (_status(first), _status(second)) == ("finished", "finished")


def test_server_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _prepare(tmp_path / "first"), _prepare(tmp_path / "second", *SHORT)
    others = children(os.getpid())
    with ForkServer() as server:
        server.warm()
        (process,) = set(children(os.getpid())) - set(others)
        os.kill(process, signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr("syncbn.train.launch.client._ANSWER_TIMEOUT_S", 0.1)
            with pytest.raises(TrainingError, match="did not answer"):
                _start(server, first)
        assert not is_alive(process)
        _wait_for_end(_start(server, second))
        assert _status(second) == "finished"


def test_jobs_of_a_sweep_share_its_server(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "set below, and not any more after this test")
    server.share()
    other = ForkServer()
    run = _prepare(tmp_path / "run", *SHORT)
    _wait_for_end(_start(other, run))
    assert _status(run) == "finished"
    assert other._process is None  # pyright: ignore[reportPrivateUsage] -- it needed none
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with other:
        again = _prepare(tmp_path / "again", *SHORT)
        _wait_for_end(_start(other, again))
        assert _status(again) == "finished"
        assert other._process is not None  # pyright: ignore[reportPrivateUsage] -- as above


_STARTER = """
import sys, time
from pathlib import Path
from syncbn.train.launch.client import ForkServer
if __name__ == "__main__":
    server = ForkServer()
    print(server.start(Path(sys.argv[1]), Path(sys.argv[2]), {}), server._process.pid, flush=True)
    time.sleep(300)
"""


def test_supervisor_outlives_its_server_and_who_started_that(tmp_path: Path) -> None:
    run = _prepare(tmp_path / "run", "epochs=500", "log_every_steps=1")
    command = [sys.executable, "-c", _STARTER, str(run.path), str(tmp_path / "console")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        supervisor, server = map(int, starter.stdout.readline().split())
        wait_until(run.steps_file.exists)
        starter.kill()
    wait_until(lambda: not is_alive(server))
    before = run.steps_file.stat().st_size
    wait_until(lambda: run.steps_file.stat().st_size > before)
    with pytest.raises(ConfigError, match="another job is training in"):
        run.lock()
    os.kill(supervisor, signal.SIGTERM)
    _wait_for_end(supervisor)
    assert _status(run) == "interrupted"
    run.lock().close()


@pytest.mark.parametrize("jobs", [4, pytest.param(50, marks=pytest.mark.long)])
def test_many_jobs_leave_nothing_behind_in_the_server(
    server: ForkServer, tmp_path: Path, jobs: int
) -> None:
    pid = _server_pid(server)

    def run_jobs(count: int) -> None:
        name = secrets.token_hex(4)
        for first in range(0, count, 2):
            runs = [_prepare(tmp_path / f"{name}-{first + k}", *SHORT) for k in range(2)]
            pids = [_start(server, run) for run in runs]
            assert _threads(pid) == 1
            for each, run in zip(pids, runs, strict=True):
                _wait_for_end(each)
                assert _status(run) == "finished", Path(f"{run.path}.out").read_text()

    run_jobs(2)  # the first have it load what all need
    open_files = _open_files(pid)
    memory_kb = _memory_kb(pid)
    run_jobs(jobs)
    assert _open_files(pid) == open_files
    wait_until(lambda: not children(pid))  # none is left for somebody to reap
    assert _memory_kb(pid) < memory_kb + 2_000


def _open_files(pid: int) -> list[Path]:
    return sorted(Path(f"/proc/{pid}/fd").iterdir())


def _memory_kb(pid: int) -> int:
    """Return how much memory a process has for itself alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith("Anonymous:"))
    return int(size)


def test_request_arrives_whole_with_its_files() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = Request("/run", "/", "/console", "=== 1", {"A": "b" * 70_000}, ("C",), (0, 1))
        with socket.socket() as file:
            send_request(ours, request, [file.fileno()])
            received, files = receive_request(theirs)
            assert os.fstat(files[0]).st_ino == os.fstat(file.fileno()).st_ino
            os.close(files[0])
        assert received == Request(
            *("/run", "/", "/console", "=== 1", {"A": "b" * 70_000}),
            *(["C"], [0, 1]),
        )
        send(theirs, pid=1)
        send(theirs, exit_code=2)
        assert receive(ours) == {"pid": 1}
        assert receive(ours) == {"exit_code": 2}
        theirs.close()
        assert receive(ours) is None


def test_job_goes_on_whose_starter_dies_before_it_is_answered(
    server: ForkServer, tmp_path: Path
) -> None:
    run = _prepare(tmp_path / "run", *SHORT)
    directory = server._directory  # pyright: ignore[reportPrivateUsage] -- to ask without waiting
    assert directory is not None
    request = Request(str(run.path), str(tmp_path), console=f"{run.path}.out", header="begun")
    with run.lock(), socket.socket(socket.AF_UNIX) as connection:  # for which it waits
        connection.connect(str(directory / "socket"))
        send_request(connection, request, ())
        connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: _status(run) == "finished")
    assert Path(f"{run.path}.out").read_text().count("begun") == 1
