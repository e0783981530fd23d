"""A disk that is full, read-only or damaged: jobs are refused with a reason, models are served."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from syncbn.jobs.states import State
from syncbn.jobs.store.database import FILE
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from tests.support.dispatching import DIGITS, TIMEOUT_S, TINY
from tests.support.serving import Service, served

pytestmark = pytest.mark.long
_SIZE = "48m"


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        for directory in (place / "jobs" / "work").glob("*"):
            for process in Workspace(directory).holders():
                os.kill(process, signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def _serving(tmp_path: Path, jobs: Path, *options: str) -> Generator[Service]:
    log = tmp_path / "log"
    arguments = ("--jobs", str(jobs), "--dispatcher-gpus", "0", *options)
    with served(tmp_path / "models", log, *arguments) as service:
        yield service


def _until(condition: Callable[[], bool], service: Service) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, service.log.read_text()[-5000:]
        time.sleep(0.1)


def _submit(service: Service, submission: dict[str, Any]) -> httpx2.Response:
    return service.ask("POST", "/v1/jobs", json=submission)


def _state(service: Service, job: str) -> str:
    return service.ask("GET", f"/v1/jobs/{job}").json()["state"]


def _fill(disk: Path) -> Path:
    """Write a file until there is no room."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as stream:
        for size_bytes in (1 << 20, 1 << 12, 1):
            try:
                while stream.write(b"x" * size_bytes):
                    pass
            except OSError:
                continue
    return file


def _serves(service: Service) -> bool:
    return all(
        service.ask("GET", path).status_code == 200
        for path in ("/v2/health/ready", "/v2/models", "/jobs", "/metrics")
    )


def test_full_disk_is_told_and_all_goes_on_once_there_is_room(tmp_path: Path, disk: Path) -> None:
    with _serving(tmp_path, disk / "jobs") as service:
        job = _submit(service, {**DIGITS, "retries": 10}).json()["id"]
        _until(lambda: _state(service, job) == State.running, service)
        filler = _fill(disk)
        # What is left of pages that were made before is used up first.
        _until(lambda: _submit(service, {**TINY, "priority": -1}).status_code == 503, service)
        answer = _submit(service, TINY)
        assert answer.status_code == 503
        assert "the store of jobs cannot be used now" in answer.json()["error"]
        assert "the disk is full: make room" in answer.json()["error"]
        assert answer.headers["retry-after"]
        for path in ("/v1/jobs", f"/v1/jobs/{job}", f"/v1/jobs/{job}/log", "/v1/options"):
            assert service.ask("GET", path).status_code == 200, path
        assert _serves(service)
        _until(lambda: "make room; trying again" in service.log.read_text(), service)
        time.sleep(3)  # in which the dispatcher tries in vain
        assert service.log.read_text().count("make room; trying again") < 5  # it says so once
        filler.unlink()
        last: list[str] = []

        def is_taken() -> bool:
            answer = _submit(service, TINY)
            last.append(answer.json().get("id", ""))
            return answer.status_code == 201

        _until(is_taken, service)
        _until(lambda: _state(service, last[-1]) == State.finished, service)
        _until(lambda: _state(service, job) == State.finished, service)
    assert "Traceback" not in service.log.read_text()


def test_store_that_cannot_be_written_is_told(tmp_path: Path, disk: Path) -> None:
    Store(disk / "jobs").close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with _serving(tmp_path, disk / "jobs") as service:
        for method in ("GET", "POST"):
            answer = service.ask(method, "/v1/jobs", json={} if method == "POST" else None)
            assert answer.status_code == 503
            assert "this user needs to write to it and to its directory" in answer.json()["error"]
        assert _serves(service)
        _until(lambda: "the dispatcher of jobs ended" in service.log.read_text(), service)
        assert "Read-only file system" in service.log.read_text()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        job = _submit(service, TINY).json()["id"]
        _until(lambda: _state(service, job) == State.finished, service)


def test_store_that_another_process_keeps_is_told(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    with _serving(tmp_path, jobs) as service:
        _until(lambda: service.ask("GET", "/v1/options").json()["dispatcher"] is not None, service)
        other = sqlite3.connect(jobs / FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = _submit(service, TINY)
        assert answer.status_code == 503
        assert "another process has kept it for too long: try again" in answer.json()["error"]
        assert service.ask("GET", "/v1/jobs").json()["total"] == 0
        assert _serves(service)
        other.execute("ROLLBACK")
        other.close()
        job = _submit(service, TINY).json()["id"]
        _until(lambda: _state(service, job) == State.finished, service)
    assert "Traceback" not in service.log.read_text()


def test_damaged_store_is_told_and_a_copy_is_gone_on_with(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    with _serving(tmp_path, jobs) as service:
        _until(lambda: "dispatching" in service.log.read_text(), service)
        job = _submit(service, TINY).json()["id"]
        _until(lambda: _state(service, job) == State.finished, service)
        with sqlite3.connect(jobs / FILE) as source, sqlite3.connect(jobs / "copy") as copy:
            source.backup(copy)
        source.close()
        copy.close()
        for name in (f"{FILE}-wal", FILE):
            with (jobs / name).open("r+b") as stream:
                size_bytes = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                stream.write(b"\xa5" * size_bytes)
        _until(lambda: service.ask("GET", "/v1/jobs").status_code == 503, service)
        assert "the file is damaged" in service.ask("GET", "/v1/jobs").json()["error"]
        assert _submit(service, TINY).status_code == 503
        assert _serves(service)
        for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
            (jobs / name).rename(jobs / f"damaged.{name}")
        (jobs / "copy").rename(jobs / FILE)
        _until(lambda: service.ask("GET", "/v1/jobs").status_code == 200, service)
        assert _state(service, job) == State.finished
        # The dispatcher may have had all that it read in its memory, and noticed nothing.
        _until(lambda: "another file has taken the place" in service.log.read_text(), service)
        second = _submit(service, TINY).json()["id"]
        _until(lambda: _state(service, second) == State.finished, service)
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("victims", ["service", "everything"])
def test_jobs_outlive_the_service(tmp_path: Path, victims: str) -> None:
    jobs = tmp_path / "jobs"
    with _serving(tmp_path, jobs) as service:
        job = _submit(service, {**DIGITS, "retries": 1}).json()["id"]
        steps = Workspace.of_job(jobs, job).run.steps_file
        _until(lambda: steps.exists() and steps.read_bytes().count(b"\n") > 20, service)
        dispatcher = service.ask("GET", "/v1/options").json()["dispatcher"]["pid"]
        service.process.kill()
        if victims == "everything":
            os.kill(dispatcher, signal.SIGKILL)
            for process in Workspace.of_job(jobs, job).holders():
                os.kill(process, signal.SIGKILL)
    with _serving(tmp_path, jobs) as again:
        _until(lambda: _state(again, job) == State.finished, again)
        attempts = 2 if victims == "everything" else 1
        detail = again.ask("GET", f"/v1/jobs/{job}").json()
        assert [each["status"] for each in detail["attempts"]].count("finished") == 1
        assert detail["attempt"] == len(detail["attempts"]) == attempts
        log = again.ask("GET", f"/v1/jobs/{job}/log", params={"limit": 1 << 20}).text
        assert log.count("=== attempt ") == attempts
