"""Measure the service beside LitServe, BentoML, MLServer and plain FastAPI, on loopback.

python -m scripts.bench.serve --peers DIR      prints the tables; DIR gets the peers' environments
python -m scripts.bench.serve --only tiny      one of the models: tiny or resnet18
python -m scripts.bench.serve --json FILE      also writes the figures
python -m scripts.bench.serve --write          also puts the tables into docs/performance.md

All serve the same bundle, with one worker and one torch thread or two. Each server is started once
and stands still (SIGSTOP) but for its slices of a round; a figure is the median over the rounds.
Each connection sends one image, again as soon as it is answered, and every answer is checked. Ours
runs as its users run it, with keys, metrics and logs. The peers' programs and settings are in
scripts/bench/peers.py. A batch of 16 images without a server is measured in the same rounds: as the
service computes it, with what torch has to make it fast, and as a bundle does without either.
"""

import argparse
import asyncio
import ctypes
import gc
import http.client
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import uvloop
from torch import Tensor

from scripts import REPOSITORY
from scripts.bench.measure import Rows, machine, measured_on, progress, table
from scripts.bench.peers import PEERS, Array, Headers, Wire, protocol_wires
from scripts.dev.document import write_table
from service.model import Compute, Predictor
from syncbn.bundle import (
    Architecture,
    Description,
    InputSpec,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from syncbn.models import build_model
from syncbn.transforms.fold import fold

OURS = "ours"
NAMES = {OURS: "syncbn", **{key: peer.name for key, peer in PEERS.items()}}
ENCODINGS = ["raw", "json"]
OUTPUT = "output"
SAMPLES = 32
TOLERANCE = 1e-4
BATCH_SIZE = 16
INSTALL_TIMEOUT_S = 1800
START_TIMEOUT_S = 120
ANSWER_TIMEOUT_S = 10
RAMP_S = 0.3  # of a slice, before it is counted
WARM_UP_S = 0.5
BUSY_S = 0.5
_T = TypeVar("_T")
_SPAWN = multiprocessing.get_context("spawn")
_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


@dataclass(frozen=True)
class Workload:
    """A model and its input."""

    title: str
    architecture: str
    arguments: Mapping[str, int | float | bool | str]
    shape: tuple[int, int, int]


WORKLOADS = {
    "tiny": Workload(
        "cnn of width 16, 1×8×8",
        "cnn",
        {"in_channels": 1, "num_classes": 10, "width": 16},
        (1, 8, 8),
    ),
    "resnet18": Workload(
        "ResNet-18, 3×64×64",
        "torchvision.resnet18",
        {"in_channels": 3, "num_classes": 10},
        (3, 64, 64),
    ),
}


def write_model(name: str, directory: Path) -> Path:
    """Write the bundle of a random model whose running statistics have moved."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = build_model(workload.architecture, workload.arguments)
    with torch.no_grad():
        model(torch.randn(64, *workload.shape))
    channels = workload.shape[0]
    description = Description(
        name=name,
        architecture=Architecture(name=workload.architecture, arguments=workload.arguments),
        input=InputSpec(name="image", shape=workload.shape, dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.5,) * channels, std=(2.0,) * channels),
        classes=tuple(map(str, range(10))),
        metrics={},
        config_sha256="0" * 64,
    )
    write_bundle(directory / name, description, model)
    return directory / name


def write_samples(bundle: Path, file: Path) -> None:
    """Write samples, and the probabilities that a server must answer with."""
    read = read_bundle(bundle)
    torch.manual_seed(1)
    samples = torch.randn(SAMPLES, *read.manifest.input.shape)
    np.savez(file, samples=samples.numpy(), expected=read.probabilities(samples).numpy())


# The load generator: a process of its own that is told what to send, and tells what came back.


@dataclass(frozen=True)
class Slice:
    """What the load generator does next.

    Attributes:
        port: of the server, on loopback.
        wire: how it is asked.
        samples: the file of samples and what they must give.
        connections: how many ask at the same time.
        seconds: for how long it is counted, after a short ramp.
    """

    port: int
    wire: Wire
    samples: Path
    connections: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """What came of a slice: answers a second, times in milliseconds, and what went wrong."""

    rate: float
    p50_ms: float
    p99_ms: float
    errors: int
    error: str
    own_cpu: float


class _Traffic:
    """What the connections of a slice share.

    Args:
        wire: how the server is asked.
        samples: what to send, over and over.
        expected: the probabilities of each.
    """

    _LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)

    def __init__(self, wire: Wire, samples: Array, expected: Array) -> None:
        self._wire = wire
        self._expected = expected
        # An answer that was found right need not be read again. The same sample may give several,
        # as float32 sums depend on what else is in a batch.
        self._right: set[tuple[int, bytes]] = set()
        self.requests = [self._request(sample[np.newaxis]) for sample in samples]
        self.finished: list[tuple[float, float]] = []
        self.errors: list[str] = []

    def _request(self, sample: Array) -> bytes:
        body, headers = self._wire.encode(sample)
        lines = [f"POST {self._wire.path} HTTP/1.1", "Host: localhost"]
        lines += [f"{key}: {value}" for key, value in {**self._wire.headers, **headers}.items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        return head.encode() + body

    def length(self, head: bytes) -> int | None:
        """Return the length of an answer's body, if its head says so."""
        match = self._LENGTH.search(head)
        return int(match[1]) if match else None

    def check(self, which: int, head: bytes, body: bytes) -> None:
        """Note an error unless an answer is 200 and holds a sample's probabilities."""
        if head[9:12] != b"200":
            self.errors.append(f"{head[9:].splitlines()[0].decode()}: {body[:200]!r}")
            return
        if (which, body) in self._right:
            return
        lines = (line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:])
        try:
            answer = self._wire.decode({k.lower(): v for k, _, v in lines}, body).ravel()
            expected = self._expected[which]
            right = answer.shape == expected.shape and np.allclose(answer, expected, 0, TOLERANCE)
        except Exception as error:  # whatever the body made of it
            self.errors.append(f"{type(error).__name__}: {error}: {body[:200]!r}")
            return
        if not right:
            self.errors.append(f"sample {which}: {answer} instead of {expected}")
        elif len(self._right) < 10_000:
            self._right.add((which, body))


class _Client(asyncio.Protocol):
    """One connection: sends a request as soon as the last is answered.

    Args:
        traffic: of the slice.
        number: of the connection, which says with which sample it begins.
    """

    def __init__(self, traffic: _Traffic, number: int) -> None:
        self._traffic = traffic
        self._number = number
        self._sent_at = 0.0
        self._received = bytearray()
        self._head_bytes = self._bytes = 0
        self._transport: asyncio.Transport | None = None
        self.stopping = False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        assert self._transport
        self._sent_at = time.perf_counter()
        self._transport.write(self._traffic.requests[self._number % SAMPLES])

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._bytes:
            head_bytes = received.find(b"\r\n\r\n") + 4
            if head_bytes < 4:
                return
            length = self._traffic.length(bytes(received[:head_bytes]))
            if length is None:
                self.give_up(f"no Content-Length: {bytes(received[:head_bytes])!r}")
                return
            self._head_bytes, self._bytes = head_bytes, head_bytes + length
        if len(received) < self._bytes:
            return
        now = time.perf_counter()
        traffic = self._traffic
        traffic.finished.append((now, now - self._sent_at))
        head, body = bytes(received[: self._head_bytes]), bytes(received[self._head_bytes :])
        received.clear()
        self._bytes = 0
        traffic.check(self._number % SAMPLES, head, body)
        self._number += 1
        if self.stopping:
            self._end()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.give_up(f"the connection was closed: {exc or 'by the server'}")

    def give_up(self, error: str) -> None:
        """Note an error, and end."""
        self._traffic.errors.append(error)
        self._end()

    def _end(self) -> None:
        self.over.set_result(None)
        if self._transport:
            self._transport.abort()


async def _run_slice(wanted: Slice, traffic: _Traffic) -> Load:
    loop = asyncio.get_running_loop()
    begin = time.perf_counter() + RAMP_S
    end = begin + wanted.seconds
    cpu_s = time.process_time()
    clients: list[_Client] = []
    for number in range(wanted.connections):
        _, client = await loop.create_connection(
            lambda number=number: _Client(traffic, number), "127.0.0.1", wanted.port
        )
        clients.append(client)
    await asyncio.sleep(end - time.perf_counter())
    cpu_s = time.process_time() - cpu_s
    for client in clients:
        client.stopping = True
    await asyncio.wait([client.over for client in clients], timeout=ANSWER_TIMEOUT_S)
    for client in clients:
        if not client.over.done():
            client.give_up(f"no answer within {ANSWER_TIMEOUT_S} s")
    times = sorted(took for at, took in traffic.finished if begin <= at < end) or [math.nan]
    return Load(
        rate=sum(begin <= at < end for at, _ in traffic.finished) / wanted.seconds,
        p50_ms=times[len(times) // 2] * 1e3,
        p99_ms=times[len(times) * 99 // 100] * 1e3,
        errors=len(traffic.errors),
        error=next(iter(traffic.errors), ""),
        own_cpu=cpu_s / (RAMP_S + wanted.seconds),
    )


def _be_load_generator(pipe: Connection) -> None:
    gc.disable()  # a slice leaves little behind, and a collection would look like a slow server
    traffics: dict[str, _Traffic] = {}
    while wanted := pipe.recv():
        assert isinstance(wanted, Slice)
        key = f"{wanted.port} {wanted.wire}"
        if key not in traffics:
            with np.load(wanted.samples) as file:
                traffics[key] = _Traffic(wanted.wire, file["samples"], file["expected"])
        traffic = traffics[key]
        traffic.finished.clear()
        traffic.errors.clear()
        try:
            pipe.send(uvloop.run(_run_slice(wanted, traffic)))
        except OSError as error:  # nobody listens any more
            pipe.send(Load(0, math.nan, math.nan, 1, str(error), 0))
        gc.collect()


# What is measured without a server, in a process of its own too.


def as_served(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return what the service computes of raw samples, as it does."""
    compute = Compute(
        device=torch.device("cpu"),
        dtype=torch.float32,
        compile=False,
        threads=torch.get_num_threads(),
        max_batch_size=BATCH_SIZE,
        max_queue_rows=BATCH_SIZE,
        timeout_s=1,
        drift=False,
    )
    predictor = Predictor(read_bundle(bundle), compute)
    return lambda x: torch.from_numpy(predictor(x.numpy()))


def as_torch_has_it(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return the probabilities of raw samples with what torch has to make them fast."""
    read = read_bundle(bundle)
    preprocess = read.manifest.preprocessing.prepared(4, torch.device("cpu"))
    model = fold(read.model).model.to(memory_format=torch.channels_last)

    def probabilities(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(preprocess(x).to(memory_format=torch.channels_last)).softmax(1)

    return probabilities


def as_read(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return the probabilities of raw samples as a bundle has them, which the peers serve."""
    return read_bundle(bundle).probabilities


IN_PROCESS = {"as served": as_served, "folded, channels_last": as_torch_has_it, "as read": as_read}


def _be_model(pipe: Connection, bundle: Path, samples: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    with np.load(samples) as file:
        images = torch.from_numpy(file["samples"][:BATCH_SIZE])
        expected = torch.from_numpy(file["expected"][:BATCH_SIZE])
    models = {name: make(bundle) for name, make in IN_PROCESS.items()}
    while wanted := pipe.recv():
        name, seconds = wanted
        model, batches = models[name], 0
        torch.testing.assert_close(model(images), expected, rtol=0, atol=TOLERANCE)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            model(images)
            batches += 1
        pipe.send(batches * BATCH_SIZE / (time.perf_counter() - start))


@contextmanager
def helper(work: Callable[..., None], *arguments: Any) -> Generator[Callable[[Any], Any]]:
    """Run a function in a process of its own; yield what asks it something and returns its answer.

    Args:
        work: called with its end of a pipe and the arguments, until it is sent None.
        *arguments: to be pickled.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()

    def ask(question: Any) -> Any:
        ours.send(question)
        return ours.recv()

    try:
        yield ask
    finally:
        process.kill()
        process.join()


# The servers.


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
        for pid in reversed(_family(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _family(pid: int) -> list[int]:
    """Return a process and its descendants, in whatever groups and sessions; parents first."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which is in parentheses and may hold any others: state and parent.
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def no_process_left() -> Generator[None]:
    """Kill all that descends from this process in the end, which a signal may bring."""
    # Or orphans would become children of process 1.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        _kill(_family(os.getpid())[1:])


@contextmanager
def started(
    command: list[str], directory: Path, environment: Headers
) -> Generator[subprocess.Popen[bytes]]:
    """Run a server in a directory, its output to a file there; kill it and its children after."""
    with (directory / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill(_family(process.pid))
        process.wait()


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


# What is measured, and what it says.


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        servers: keys of NAMES.
        encodings: of ENCODINGS.
        connections: how many at a time.
        rounds: how often each takes its turn.
        seconds: of a slice.
        environments: where those of the peers are.
    """

    servers: list[str]
    encodings: list[str]
    connections: list[int]
    rounds: int
    seconds: float
    environments: Path

    def asked(self) -> list[tuple[str, int]]:
        """Return what is asked of every server: encodings, and numbers of connections."""
        return list(itertools.product(self.encodings, self.connections))


@dataclass(frozen=True)
class Figures:
    """What was measured of a model.

    Attributes:
        model: of WORKLOADS.
        threads: of torch.
        loads: one a round, by encoding, connections and server.
        rates: images a second without a server, one a round, by what computes.
        failures: why a server is missing, by its key.
        busy: the part of the machine that others used, before each round.
    """

    model: str
    threads: int
    loads: dict[tuple[str, int, str], list[Load]]
    rates: dict[str, list[float]]
    failures: dict[str, str]
    busy: list[float]

    def median(self, asked: tuple[str, int], key: str, value: str) -> float:
        """Return the median of what a server made of it; NaN where it was not measured."""
        loads = self.loads.get((*asked, key), [])
        return statistics.median(getattr(load, value) for load in loads) if loads else math.nan

    def best_peer(self, asked: tuple[str, int]) -> str:
        """Return the key of the fastest of the others."""
        present = [key for key in PEERS if (*asked, key) in self.loads]
        return max(present, key=lambda key: self.median(asked, key, "rate"), default="")

    def ratio(self, asked: tuple[str, int], others: list[float]) -> float:
        """Return the median over the rounds of our rate by another; NaN where one is missing."""
        ours = self.loads.get((*asked, OURS), [])
        ratios = [load.rate / other for load, other in zip(ours, others, strict=False) if other]
        return statistics.median(ratios) if ratios else math.nan

    def over(self, asked: tuple[str, int], key: str) -> float:
        """Return the ratio of our rate to that of another server."""
        return self.ratio(asked, [load.rate for load in self.loads.get((*asked, key), [])])


def measure(model: str, threads: int, plan: Plan) -> Figures:
    """Start all servers, and let them take turns."""
    figures = Figures(model, threads, {}, {name: [] for name in IN_PROCESS}, {}, [])
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory = Path(temporary)
        bundle, samples = write_model(model, directory / "models"), directory / "samples.npz"
        write_samples(bundle, samples)
        generate = stack.enter_context(helper(_be_load_generator))
        compute = stack.enter_context(helper(_be_model, bundle, samples, threads))

        def load(server: Server, asked: tuple[str, int], seconds: float) -> Load:
            encoding, connections = asked
            wire = server.wires[encoding]
            with server.awake():
                return generate(Slice(server.port, wire, samples, connections, seconds))

        servers: list[Server] = []
        for key in plan.servers:
            there = directory / key
            there.mkdir()
            try:
                server = stack.enter_context(
                    our_server(bundle, threads, there)
                    if key == OURS
                    else peer_server(key, plan.environments, bundle, threads, there)
                )
                for asked in plan.asked():
                    first = load(server, asked, WARM_UP_S)
                    if not first.rate and first.errors:
                        raise CannotServeError(f"does not answer: {first.error}")
                servers.append(server)
            except CannotServeError as error:
                figures.failures[key] = str(error)
                print(f"{NAMES[key]} {error}", file=sys.stderr)
        for turn in range(plan.rounds):
            where = {"model": model, "threads": threads, "turn": turn}
            figures.busy.append(_busy())
            progress({**where, "used by others": f"{figures.busy[-1]:.0%}"})
            for asked in plan.asked():
                for server in _rotated(servers, turn):
                    new = load(server, asked, plan.seconds)
                    figures.loads.setdefault((*asked, server.key), []).append(new)
                    what = dict(zip(("encoding", "connections"), asked, strict=True))
                    progress({**where, **what, "server": server.key, **_rounded(asdict(new))})
            for name in _rotated(list(IN_PROCESS), turn):
                figures.rates[name].append(compute((name, plan.seconds)))
                progress({**where, "how": name, **_rounded({"rate": figures.rates[name][-1]})})
    return figures


def _busy() -> float:
    """Return the part of the machine that is used while all of ours stands still."""

    def ticks() -> tuple[int, int]:
        values = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
        return sum(values), values[3] + values[4]  # idle, and waiting for a disk

    (all_before, idle_before), _, (all_after, idle_after) = ticks(), time.sleep(BUSY_S), ticks()
    return 1 - (idle_after - idle_before) / max(1, all_after - all_before)


def _rotated(items: list[_T], turn: int) -> list[_T]:
    first = turn % max(1, len(items))
    return items[first:] + items[:first]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}


@dataclass(frozen=True)
class Bar:
    """What is required of us.

    Attributes:
        words: what.
        connections: at how many.
        value: what is seen of an encoding and number of connections.
        least: what it must reach; None where `below` is the bar.
        below: what it must stay under.
    """

    words: str
    connections: int
    value: Callable[[Figures, tuple[str, int]], float]
    least: float | None = None
    below: float = math.inf

    def line(self, measured: list[Figures], encodings: list[str]) -> str:
        """Return what was seen of it, and whether it is met."""
        seen: dict[str, float] = {}
        for figures, encoding in itertools.product(measured, encodings):
            threads = "1 thread" if figures.threads == 1 else f"{figures.threads} threads"
            seen[f"{encoding}, {threads}"] = self.value(figures, (encoding, self.connections))
        seen = {name: value for name, value in seen.items() if not math.isnan(value)}
        if not seen:
            return f"- {self.words}: not measured."
        met = all((self.least or 0) <= value < self.below for value in seen.values())
        each = "; ".join(f"{name}: {value:.2f}" for name, value in seen.items())
        return f"- {self.words}: {'met' if met else 'missed'} ({each})."


def _over_best(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, figures.best_peer(asked))


def _over_fastapi(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, "fastapi")


def _over_inline(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, "fastapi-inline")


def _over_in_process(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.ratio(asked, figures.rates["as served"])


def _p99(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.median(asked, OURS, "p99_ms")


BARS = {
    "tiny": [
        Bar("32 connections, 3 times the best of the others", 32, _over_best, 3),
        Bar("32 connections, 99 % answered in under 20 ms", 32, _p99, below=20),
        Bar("1 connection, 0.9 times FastAPI", 1, _over_fastapi, 0.9),
        Bar("1 connection, 0.9 times FastAPI inline", 1, _over_inline, 0.9),
    ],
    "resnet18": [
        Bar("32 connections, 1.2 times the best of the others", 32, _over_best, 1.2),
        Bar("32 connections, 0.9 times a batch of 16 without server", 32, _over_in_process, 0.9),
        Bar("8 connections, 1.4 times the best of the others", 8, _over_best, 1.4),
    ],
}


def report(measured: list[Figures], plan: Plan) -> str:
    """Return the tables of a model, its bars, and what went wrong."""
    rates: Rows = []
    times: Rows = []
    for figures, asked in itertools.product(measured, plan.asked()):
        row = {"threads": figures.threads, "encoding": asked[0], "connections": asked[1]}
        rate = {NAMES[key]: figures.median(asked, key, "rate") for key in plan.servers}
        rates.append({**row, **_marked(rate), **_marked({"ratio": _over_best(figures, asked)})})
        took = {
            NAMES[key]: " / ".join(
                f"{figures.median(asked, key, value):.1f}" for value in ("p50_ms", "p99_ms")
            )
            for key in plan.servers
        }
        times.append({**row, **took})
    alone: Rows = [
        {"threads": figures.threads}
        | {name: statistics.median(each) for name, each in figures.rates.items()}
        for figures in measured
    ]
    bars = [bar.line(measured, plan.encodings) for bar in BARS[measured[0].model]]
    return "\n\n".join(
        [
            "Requests a second; the ratio is of ours to the best of the others:",
            table(rates),
            "Milliseconds to an answer, median / 99th percentile:",
            table(times),
            "Images a second without a server, in batches of 16:",
            table(alone),
            "\n".join([*bars, f"- No errors: {_errors(measured)}"]),
        ]
    )


def _marked(values: dict[str, float]) -> dict[str, Any]:
    return {name: "–" if math.isnan(value) else value for name, value in values.items()}


def _errors(measured: list[Figures]) -> str:
    """Return what went wrong at whom."""
    lines: list[str] = []
    for figures in measured:
        for key, why in figures.failures.items():
            lines.append(f"{NAMES[key]} on {figures.threads} threads {' '.join(why.split())}")
        for (encoding, connections, key), loads in figures.loads.items():
            for load in loads:
                if load.errors:
                    asked = f"{encoding}, {connections} connections, {figures.threads} threads"
                    lines.append(f"{NAMES[key]} ({asked}): {load.errors}, first {load.error}")
    ours = [line for line in lines if line.startswith(NAMES[OURS])]
    return "; ".join([f"{'missed' if ours else 'met'}", *lines]) + "."


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        default=REPOSITORY / "build" / "peers",
        help="where the peers' environments of Python are; missing ones are made with pip "
        "(5 GB each with CUDA's libraries, which pip adds to torch; default: build/peers)",
    )
    parser.add_argument("--only", choices=list(WORKLOADS), help="one model instead of both")
    parser.add_argument("--servers", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=ENCODINGS)
    parser.add_argument(
        "--connections", nargs="+", type=int, metavar="N", default=[1, 8, 32], help="at a time"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", default=[1, 2], help="of torch"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn")
    parser.add_argument("--seconds", type=float, default=2, help="how long a turn is counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    missing: dict[str, str] = {}
    settings: list[str] = []
    for key in [key for key in arguments.servers if key in PEERS]:
        peer = PEERS[key]
        try:
            settings.append(f"- {peer.name} {install(key, arguments.peers)}: {peer.settings}.")
        except CannotServeError as error:
            missing[key] = str(error)
            settings.append(f"- {peer.name}: not measured; it {' '.join(str(error).split())}")
    plan = Plan(
        [key for key in arguments.servers if key not in missing],
        arguments.encodings,
        arguments.connections,
        arguments.rounds,
        arguments.seconds,
        arguments.peers.absolute(),
    )
    everything: dict[str, Any] = {"machine": machine(), "settings": settings}
    print(*(f"{key}: {value}" for key, value in everything["machine"].items()), sep="\n")
    print(*settings, sep="\n")
    for model in [arguments.only] if arguments.only else list(WORKLOADS):
        with no_process_left():
            measured = [measure(model, threads, plan) for threads in arguments.threads]
        busy = max(part for figures in measured for part in figures.busy)
        on = measured_on(everything["machine"], arguments.rounds).replace("turns", "rounds")
        on = f"{on} Between the rounds, others used up to {busy:.0%} of the machine."
        text = f"{report(measured, plan)}\n\n{on}"
        print(f"\n## {model}: {WORKLOADS[model].title}\n\n{text}", flush=True)
        everything[model] = [_plain(figures) for figures in measured]
        if arguments.write:
            write_table("performance.md", f"scripts.bench.serve {model}", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")


def _plain(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON has them."""
    loads = [
        {"encoding": encoding, "connections": connections, "server": key, **asdict(load)}
        for (encoding, connections, key), each in figures.loads.items()
        for load in each
    ]
    return {
        "threads": figures.threads,
        "loads": loads,
        "rates": figures.rates,
        "failures": figures.failures,
        "busy": figures.busy,
    }


if __name__ == "__main__":
    main()
