import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.jobs import dispatcher
from service.jobs.dispatcher import DispatcherChild, command_of
from service.settings import Settings
from syncbn.jobs.dispatch.claim import Claim
from tests.support.serving import served

DEADLINE_S = 240


def wait_for(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_command_has_the_options_that_were_given() -> None:
    command = command_of(Settings(models=Path("m"), jobs=Path("j")))
    assert command[1:] == [
        *("-m", "syncbn.jobs.dispatch.command", "j", "--models", "m", "--until-stdin-closes"),
        *("--engine", "local"),
    ]
    given = Settings(
        models=Path("m"),
        jobs=Path("j"),
        dispatcher_cores=3,
        dispatcher_gpus=0,
        dispatcher_engine="slurm",
    )
    assert command_of(given)[-6:] == ["--cores", "3", "--gpus", "0", "--engine", "slurm"]


def test_child_ends_when_its_pipe_does(tmp_path: Path) -> None:
    program = (
        f"import sys, pathlib; sys.stdin.read(); pathlib.Path({str(tmp_path / 'end')!r}).touch()"
    )
    with DispatcherChild(python(program)) as child:
        child.tell()
        child.tell()
    assert (tmp_path / "end").exists()
    assert not any(thread.name == "dispatcher" for thread in threading.enumerate())


def test_child_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatcher, "_END_TIMEOUT_S", 0.2)
    caplog.set_level(logging.INFO)
    with DispatcherChild(python("print('here', flush=True); import time; time.sleep(600)")):
        wait_for(lambda: "here" in caplog.text)
    assert "did not end within 0.2 s, and is killed" in caplog.text


def test_child_that_ends_is_started_again_and_its_words_are_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatcher, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(dispatcher, "_LONGEST_PAUSE_S", 0.02)
    caplog.set_level(logging.INFO)
    count = tmp_path / "count"
    program = (
        f"open({str(count)!r}, 'a').write('x'); import sys; "
        "print('2026-11-30 15:06:39,136 WARNING odd'); sys.exit('j has a dispatcher already: me')"
    )
    with DispatcherChild(python(program)):
        wait_for(lambda: count.exists() and len(count.read_text()) >= 3)
    assert caplog.text.count("ended: j has a dispatcher already: me; it is started again") == 1
    assert ("service.jobs.dispatcher", logging.WARNING, "odd") in caplog.record_tuples


def test_command_that_cannot_be_started_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DispatcherChild([str(tmp_path / "none")]):
        wait_for(lambda: "cannot be started: No such file" in caplog.text)


def test_other_dispatcher_is_named_and_the_service_goes_on(tmp_path: Path) -> None:
    jobs, log = tmp_path / "jobs", tmp_path / "log"
    claim = Claim(jobs, "local")
    with served(tmp_path / "models", log, "--jobs", str(jobs)) as service:
        wait_for(lambda: "has a dispatcher already" in log.read_text())
        assert f"process {os.getpid()} on" in log.read_text()
        assert service.ask("GET", "/v1/jobs").status_code == 200
        claim.close()
        wait_for(lambda: service.ask("GET", "/v1/options").json()["dispatcher"] is not None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_dispatcher_ends_with_the_service(tmp_path: Path, number: signal.Signals) -> None:
    jobs = tmp_path / "jobs"
    with served(tmp_path / "models", tmp_path / "log", "--jobs", str(jobs)) as service:
        wait_for(lambda: service.ask("GET", "/v1/options").json()["dispatcher"] is not None)
        pid = service.ask("GET", "/v1/options").json()["dispatcher"]["pid"]
        assert Path(f"/proc/{pid}").exists()
        service.process.send_signal(number)
        service.process.wait(DEADLINE_S)
    wait_for(lambda: not _is_alive(pid))
    Claim(jobs, "local").close()


@pytest.mark.long
def test_several_workers_have_one_dispatcher(tmp_path: Path) -> None:
    jobs, log = tmp_path / "jobs", tmp_path / "log"
    options = ("--jobs", str(jobs), "--workers", "2")
    with served(tmp_path / "models", log, *options) as service:
        wait_for(lambda: "dispatching" in log.read_text())
        wait_for(lambda: log.read_text().count("Application startup complete") == 2)
        assert {service.ask("GET", "/v1/jobs").status_code for _ in range(20)} == {200}
    assert log.read_text().count("dispatching") == 1
    assert "has a dispatcher already" not in log.read_text()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
