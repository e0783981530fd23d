"""A real Ray of two machines, in a network of its own, which nothing else can reach.

Whoever reaches its dashboard runs commands, so it must not be on this machine's network, where it
would listen on all addresses. All its processes end with the host that it is in.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.hosts import Host
from tests.support.jobs import wait_until
from tests.support.processes import REPOSITORY

ADDRESS = "http://127.0.0.1:8265"
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_START_TIMEOUT_S = 300
# Nothing is sent to its makers, and nothing is looked for on the internet.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_raylet_start_wait_time_s": str(_START_TIMEOUT_S),
}
_JOBS = "import urllib.request as r; print(r.urlopen('{url}', timeout=10).read().decode())"


class RayCluster:
    """A cluster, until its host is closed.

    Args:
        host: on which all of it runs.
        directory: for its files; short, for the names of sockets.
    """

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self._directory = directory
        self.start()

    @property
    def within(self) -> list[str]:
        """What a command is prefixed with to reach it."""
        return self.host.inside()

    def start(self) -> None:
        """Start a head with two cores, and another machine with as many."""
        common = ["--num-cpus=2", "--disable-usage-stats", "--object-store-memory=100000000"]
        head = ["--head", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        head += [f"--temp-dir={self._directory}", "--include-dashboard=true"]
        self._do("start", *head, *common)
        ports = ["--dashboard-agent-listen-port=52399", "--node-ip-address=127.0.0.2"]
        self._do("start", "--address=127.0.0.1:6379", *ports, *common)
        wait_until(self._is_ready, _START_TIMEOUT_S)

    def stop(self) -> None:
        """Kill all of it; what it knew is lost."""
        self._do("stop", "--force")

    def ask(self, path: str) -> str:
        """Return what its dashboard answers."""
        code = _JOBS.format(url=ADDRESS + path)
        done = self._run([sys.executable, "-c", code])
        return done.stdout if done.returncode == 0 else ""

    def _is_ready(self) -> bool:
        return self.ask("/api/jobs/").startswith("[")

    def _do(self, *arguments: str) -> None:
        done = self._run([*_RAY, *arguments])
        assert done.returncode == 0, done.stdout

    def _run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.within, *command],
            env={**os.environ, **_VARIABLES, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * _START_TIMEOUT_S,
            check=False,
        )


def why_no_ray() -> str:
    """Return why there cannot be one here; empty if there can."""
    if importlib.util.find_spec("ray") is None:
        return "not installed: ray (the extra ray)"
    try:
        Host("probe", "10.77.0.1").close()
    except OSError as error:
        return f"this machine or user has no network namespaces: {error}"
    return ""


@contextmanager
def ray_cluster(directory: Path) -> Generator[RayCluster]:
    """Yield a cluster, and end it."""
    host = Host("ray-head", "10.77.0.1")
    try:
        yield RayCluster(host, directory)
    finally:
        host.close()
