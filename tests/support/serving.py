"""A service in a process of its own, on a free port of this machine."""

import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Service:
    """A service that is ready.

    Attributes:
        url: without a slash at the end.
        models: the directory that it looks at.
        key: what it is asked with; empty: without.
        log: the file of its output.
        process: the command.
    """

    url: str
    models: Path
    key: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send one request."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.request(method, self.url + path, headers=headers, timeout=60, **options)


@contextmanager
def served(models: Path, log: Path, *options: str, key: str = "") -> Generator[Service]:
    """Serve a directory of models; stop the service in the end, which must succeed.

    Args:
        models: the directory.
        log: the file for its output.
        *options: of the command.
        key: with which `Service.ask` asks.
    """
    command = [sys.executable, "-m", "service", "--models", str(models), "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield Service(_url(process, log), models, key, log, process)
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        if found := re.search(r" at (http://\S+),", log.read_text()):
            try:
                if httpx2.get(f"{found[1]}/v2/health/ready", timeout=5).is_success:
                    return found[1]
            except httpx2.TransportError:
                pass  # bound, but not listening yet
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
