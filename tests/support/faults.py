"""Runs to which faults come about, one after the other, under the real fork server and supervisor.

A stream is a row of faults of one kind in one place. They come about to one run after the other, in
a directory each, and to a run as often as it takes to its end: either its supervisor starts the
ranks again, or the run ends with a reason, and is gone on with by its directory.
"""

import ctypes
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.train.changes import compose_job
from syncbn.train.launch.client import VARIABLE as SERVER
from syncbn.train.launch.client import ForkServer
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory, open_run
from syncbn.train.run.result import Result
from syncbn.train.schema import TrainConfig
from tests.support.jobs import is_alive, outcome, wait_until
from tests.support.probe import FACTORY, VARIABLE, Hit, Instant, Plan, read_hits
from tests.support.processes import REPOSITORY

TIMEOUT_S = 8.0
"""After which a rank gives up waiting for another."""

JOB = (
    *("data=synthetic", "data.samples=100", "data.test_samples=24", "data.size=6"),
    *("data.classes=2", "data.batch_size=8", "data.validation=0.36", "optim.ema_decay=0.9"),
    *("epochs=12", "log_every_steps=1", "checkpoint.every_steps=2", "recalibrate=true"),
    *("track=none", "launch.device=cpu", "launch.threads=1", "launch.nproc=2", "name=faults"),
    *("model=custom", f"model.factory={FACTORY}", "optim.lr=0.05"),
    f"launch.timeout_s={TIMEOUT_S}",
)
"""A job of 64 training samples, which are 4 steps an epoch on 2 ranks."""

_DISK_BYTES = 1 << 21
_END_TIMEOUT_S = 120
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


@functools.cache
def compose_job_once() -> TrainConfig:
    """Return the job; composing takes a second."""
    return compose_job(JOB)


class Servers:
    """A fork server whose processes have a network of their own, where that can be had.

    Attributes:
        why_no_network: why it cannot; "": it can.
    """

    def __init__(self) -> None:
        self.why_no_network = ""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment.pop(SERVER, None)
        self.server = ForkServer(environment)
        starting = threading.Thread(target=self._start)  # as it moves to another network
        starting.start()
        starting.join()

    def _start(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_NETWORK):
            self.why_no_network = f"no network of its own: {os.strerror(ctypes.get_errno())}"
        else:
            _do("ip", "link", "set", "lo", "up")
        self.server.warm()

    def pid(self) -> int:
        """Return the process of the server."""
        process = self.server._process  # pyright: ignore[reportPrivateUsage] -- whose network it is
        assert process is not None
        return process.pid

    def add_interface(self, number: int) -> str:
        """Return an interface of that network that processes on this host reach each other by."""
        name = f"lo:{number}"
        inside = ("nsenter", "--target", str(self.pid()), "--net")
        address = f"10.0.0.{number}/32"
        _do(*inside, "ip", "address", "replace", address, "dev", "lo", "label", name)
        return name


@contextmanager
def small_disk(place: Path) -> Generator[Path]:
    """Yield a small disk of its own.

    Raises:
        OSError: this user cannot make one.
    """
    place.mkdir(parents=True)
    _do("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place))
    try:
        yield place
    finally:
        _do("umount", "--lazy", str(place))


@dataclass
class Case:
    """A run to which faults come about.

    Attributes:
        server: that starts it.
        work: the directory for the run, its console and what it publishes.
        plan: the file that says what shall happen.
        environment: of its processes, besides.
        max_restarts: how often its supervisor starts the ranks again.
    """

    server: ForkServer
    work: Path
    plan: Path
    environment: dict[str, str]
    max_restarts: int

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.work / "run")
        self.console = self.work / "console.log"
        self.models = self.work / "models"
        self.attempts = 0

    def attempt(self) -> Result | None:
        """Begin the run, or go on with it, and return how that ended."""
        self.attempts += 1
        if self.attempts == 1:
            config = compose_job_once()
            launch = dataclasses.replace(config.launch, max_restarts=self.max_restarts)
            own = {"run_dir": str(self.run.path), "publish": str(self.models)}
            with open_run(dataclasses.replace(config, launch=launch, **own)):
                pass
        environment = {VARIABLE: str(self.plan), **self.environment}
        pid = self.server.start(self.run.path, self.console, environment)
        try:
            wait_until(lambda: not is_alive(pid), timeout_s=_END_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.run.read_result()

    def said(self) -> str:
        """Return what was printed last."""
        return self.console.read_text(errors="replace")[-6000:]

    def end(self) -> dict[str, Any]:
        """Return what the finished run comes to, without times."""
        found = outcome(self.run)
        result = self.run.read_result()
        assert result is not None
        assert result.status == "finished"
        (version,) = (self.models / "faults").glob("[!.]*")
        found["published"] = {file.name: file.read_bytes() for file in version.iterdir()}
        found["test"] = {
            name: value for name, value in result.metrics.items() if name.startswith("test_")
        }
        bundle = self.run.bundle_dir
        assert found["published"] == {file.name: file.read_bytes() for file in bundle.iterdir()}
        del found["published"]  # its description has paths and times
        self.check_whole()
        left = [*self.work.rglob("*.tmp"), *self.run.path.glob(".bundle*")]
        left += (self.models / "faults").glob(".new*")
        assert not left, left
        return found

    def check_whole(self) -> None:
        """Check that nothing of what the run has left under its name is half-written."""
        for file in checkpoint_files(self.run.checkpoints_dir):
            read_checkpoint(file)
        for directory in (self.run.bundle_dir, *(self.models / "faults").glob("[!.]*")):
            if directory.exists():
                assert {"bundle.json", "model.safetensors"} <= {f.name for f in directory.iterdir()}
                json.loads((directory / "bundle.json").read_text())


@dataclass(frozen=True)
class Stream:
    """Faults of one kind in one place, one after the other.

    Attributes:
        number: which stream, of those that run at once.
        fault: one of `FAULTS`.
        place: one of `PLACES`.
        instants: of the faults.
        max_restarts: how often the supervisor of its runs starts the ranks again.
    """

    number: int
    fault: str
    place: str
    instants: list[Instant]
    max_restarts: int


Check = Callable[[Case, Result | None, list[Hit]], None]


def bring_about(
    stream: Stream,
    servers: Servers,
    work: Path,
    trained: Path | None,
    typical_s: dict[str, float],
    whole: dict[str, Any],
    check: Check,
) -> int:
    """Have the faults of a stream come about, and compare the end of each of its runs.

    Args:
        stream: the faults.
        servers: what starts the runs.
        work: a directory; where the disk is to be filled, a small disk.
        trained: a run that was trained, and not exported, with which each run begins; None: each
            begins with nothing.
        typical_s: how long places take.
        whole: what a run without faults comes to.
        check: called after each attempt that did not finish the run, with its faults.

    Returns:
        How often the runs were begun or gone on with.
    """
    file = work.with_name(f"{work.name}.plan")
    plan = Plan(stream.fault, stream.place, stream.instants, typical_s, disk=str(work))
    attempts = number = 0
    # One that was over before the fault was complete is tried again.
    while count_sure(file) < len(stream.instants):
        assert number < 10 * len(stream.instants), f"faults do not come about: {read_hits(file)}"
        hits = read_hits(file)
        unsure = [stream.instants[0] for hit in hits if not hit.is_sure]
        plan = dataclasses.replace(plan, instants=[*stream.instants, *unsure])
        case = Case(servers.server, work / str(number), file, {}, stream.max_restarts)
        case.work.mkdir()
        if trained is not None:
            shutil.copytree(trained, case.run.path)
        while True:
            if stream.fault == "cut network":
                interface = servers.add_interface(stream.number + 1)
                case.environment["GLOO_SOCKET_IFNAME"] = interface
                plan = dataclasses.replace(plan, interface=interface)
            plan.write(file)
            before = len(read_hits(file))
            result = case.attempt()
            new = read_hits(file)[before:]
            (work / "filler").unlink(missing_ok=True)
            if result is not None and result.status == "finished":
                break
            assert new, f"ended without a fault: {result}\n{case.said()}"
            check(case, result, new)
        attempts += case.attempts
        missed = plan.missed + 1 if read_hits(file) == hits else 0
        plan = dataclasses.replace(plan, missed=missed)
        end = case.end()
        others = [name for name, value in whole.items() if end[name] != value]
        assert not others, f"{others} differ from a run without faults\n{case.said()}"
        shutil.rmtree(case.work)
        number += 1
    return attempts


def count_sure(file: Path) -> int:
    """Return how many faults of a plan were complete while the rank was in the place."""
    return sum(hit.is_sure for hit in read_hits(file))


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
