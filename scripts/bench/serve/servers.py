"""The servers of a measurement: installed, started, and awake only in their turns."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from scripts import REPOSITORY
from scripts.bench.serve.peers import OURS, PEERS
from scripts.bench.serve.processes import OUTPUT, family, started
from scripts.bench.serve.wires import Wire, protocol_wires

INSTALL_TIMEOUT_S = 1800
START_TIMEOUT_S = 120


class CannotServeError(Exception):
    """A server cannot be installed or started; `str()` of it says why."""


@dataclass(frozen=True)
class Server:
    """A server that is up, but stands still unless it is awake.

    Attributes:
        key: of NAMES.
        port: on loopback.
        wires: how it is asked, by encoding.
        process: the one that was started.
    """

    key: str
    port: int
    wires: Mapping[str, Wire]
    process: subprocess.Popen[bytes]

    @contextmanager
    def awake(self) -> Generator[None]:
        """Let it run for a while."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        # Children first: a parent that runs while they stand still could take them for hung.
        for pid in reversed(family(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def our_server(bundle: Path, threads: int, directory: Path) -> Generator[Server]:
    """Run the service as users do, with keys, metrics and logs."""
    keys, serve = (Path(sys.executable).with_name(f"syncbn-{name}") for name in ("keys", "serve"))
    if not keys.exists():
        raise CannotServeError(f"{keys.name} is not installed; install this project again")
    file = directory / "keys"
    made = subprocess.run(
        [keys, file, "--role", "read"], capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    if made.returncode:
        raise CannotServeError(f"{keys.name} failed: {made.stderr}")
    headers = {"Authorization": f"Bearer {made.stdout.split()[-1]}"}
    (port,) = _free_ports(1)
    command = [str(serve), "--models", str(bundle.parent), "--port", str(port)]
    command += ["--threads", str(threads), "--api-keys", str(file)]
    # One worker, as the others have.
    with started(command, directory, {"SYNCBN_WORKERS": "1"}) as process:
        server = Server(OURS, port, protocol_wires(bundle.name, headers), process)
        _wait_until_ready(server, "/v2/health/ready", directory)
        yield server


@contextmanager
def peer_server(
    key: str, environments: Path, bundle: Path, threads: int, directory: Path
) -> Generator[Server]:
    """Run a peer in its own environment of Python, which must be there."""
    peer = PEERS[key]
    ports = _free_ports(3)

    def filled(text: str) -> str:
        for number, port in enumerate(ports):
            text = text.replace(f"PORT_{number}", str(port))
        text = text.replace("WAIT_S", str(peer.wait_s.get(bundle.name)))
        return text.replace("DIRECTORY", str(directory))

    (directory / "server.py").write_text(peer.program)
    for name, content in peer.files.items():
        (directory / name).write_text(filled(json.dumps(content)))
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "BENCH_BUNDLE": str(bundle),
        "BENCH_THREADS": str(threads),
        "BENCH_PORT": str(ports[0]),
        **{name: filled(value) for name, value in peer.environment.items()},
    }
    program, *arguments = peer.command
    command = [str(environments / peer.package / "bin" / program), *map(filled, arguments)]
    with started(command, directory, environment) as process:
        server = Server(key, ports[0], peer.wires, process)
        _wait_until_ready(server, peer.ready, directory)
        yield server


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _wait_until_ready(server: Server, path: str, directory: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        with suppress(OSError, http.client.HTTPException), closing(connection):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    ended = server.process.poll()
    what = "is not ready" if ended is None else f"ended with {ended}"
    raise CannotServeError(f"{what}: …{(directory / OUTPUT).read_text()[-1000:]}")


def install(key: str, environments: Path) -> str:
    """Install a peer into an environment of its own unless it is there; return its version."""
    peer, directory = PEERS[key], environments / PEERS[key].package
    torch_versions = (f"{name}=={_release(version(name))}" for name in ("torch", "torchvision"))
    wanted = [*torch_versions, "numpy", "pydantic", "safetensors", *peer.requirements]
    python = directory / "bin" / "python"
    stamp = directory / ".installed"  # comes last, so that a half is not taken for a whole
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        print(f"installing {peer.name} into {directory}", file=sys.stderr)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(directory)],
            [*pip, "install", "--quiet", *wanted],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
            )
            if done.returncode:
                raise CannotServeError(f"cannot be installed: …{done.stderr[-1000:]}")
        stamp.write_text("\n".join(wanted))
    ask = f"from importlib.metadata import version; print(version({peer.package!r}))"
    return subprocess.check_output([str(python), "-c", ask], text=True).strip()


def _release(version: str) -> str:
    return version.partition("+")[0]
