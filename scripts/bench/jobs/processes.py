"""The service and the dispatcher, started again when they end, and killed now and then."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scripts import REPOSITORY

_LOOK_S = 0.05


class Kept:
    """A command that is started again whenever it ends, until this is closed.

    Args:
        command: what is run.
        log: the file for what it prints.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.starts = 0
        self._command, self._log = command, log
        self._closed = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process as it is now."""
        return self._process.pid

    def kill(self) -> None:
        """Kill it, as a machine that has no memory left does."""
        self._process.kill()

    def close(self) -> None:
        """End it for good."""
        self._closed.set()
        self._thread.join()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        with self._log.open("ab") as output:
            return subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _keep(self) -> None:
        while not self._closed.wait(_LOOK_S):
            if self._process.poll() is not None:
                self._process = self._start()


@dataclass(frozen=True)
class Platform:
    """A service and a dispatcher of one store.

    Attributes:
        url: of the service.
        jobs: the directory of the store.
        service: its process.
        dispatcher: likewise; None: there is none.
    """

    url: str
    jobs: Path
    service: Kept
    dispatcher: Kept | None

    def usage(self) -> dict[str, float]:
        """Return the memory in MB and the open descriptors of both now."""
        found = {"service": self.service.pid}
        if self.dispatcher is not None:
            found["dispatcher"] = self.dispatcher.pid
        usage: dict[str, float] = {}
        for name, pid in found.items():
            usage[f"{name} MB"] = _memory_bytes(pid) / 1e6
            usage[f"{name} files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return usage


@contextmanager
def running(directory: Path, slots: int, *, dispatches: bool = True) -> Generator[Platform]:
    """Run a service, and a dispatcher that offers slots of one core each.

    Args:
        directory: gets the store, the models and the logs.
        slots: how many jobs run at a time.
        dispatches: whether there is a dispatcher.
    """
    jobs, models, port = directory / "jobs", directory / "models", _free_port()
    serve = [sys.executable, "-m", "service", "--models", str(models), "--jobs", str(jobs)]
    dispatch = [
        sys.executable,
        "-m",
        "syncbn.jobs.dispatch.command",
        str(jobs),
        "--models",
        str(models),
    ]
    service = Kept([*serve, "--port", str(port), "--no-dispatcher"], directory / "service.log")
    dispatcher = None
    try:
        if dispatches:
            options = ["--cores", str(slots), "--oversubscribe", "--gpus", "0"]
            dispatcher = Kept([*dispatch, *options], directory / "dispatcher.log")
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/v2/health/ready")
        yield Platform(url, jobs, service, dispatcher)
    finally:
        service.close()
        if dispatcher is not None:
            dispatcher.close()


@contextmanager
def killed_now_and_then(
    platform: Platform, period_s: float, kills: int
) -> Generator[threading.Event]:
    """Kill the service or the dispatcher, or both, now and then.

    Args:
        platform: whose processes they are.
        period_s: seconds from one kill to the next, about.
        kills: at most so many times.

    Yields:
        What ends it when it is set.
    """
    ended = threading.Event()
    chance = random.Random(0)  # noqa: S311 -- whom to kill is no secret

    def kill() -> None:
        for _ in range(kills):
            if ended.wait(chance.uniform(0.5, 1.5) * period_s):
                return
            victims = [each for each in (platform.service, platform.dispatcher) if each is not None]
            for each in chance.sample(victims, chance.choice([1, len(victims)])):
                each.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join()


def _wait_for(url: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 -- our own
            if answer.status == 200:
                return
        if time.monotonic() > deadline:
            sys.exit(f"{url} did not answer within {timeout_s:g} s")
        time.sleep(_LOOK_S)


def _memory_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
