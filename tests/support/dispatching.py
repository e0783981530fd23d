"""A store of jobs with a dispatcher in a process of its own, which tests kill and start again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.states import ENDED, State
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from tests.support.processes import REPOSITORY

# For a machine that has much else to do.
TIMEOUT_S = 300

TINY: dict[str, Any] = {
    "choices": {"data": "synthetic", "model": "mlp"},
    "values": {
        **{"data.samples": 32, "data.test_samples": 8, "data.size": 4, "data.channels": 1},
        **{"model.width": 4, "data.batch_size": 16, "max_steps": 1, "launch.nproc": 1},
    },
    "device": "cpu",
}
# Of some hundred steps, each of which leaves a checkpoint.
DIGITS: dict[str, Any] = {
    "values": {
        **{"epochs": 6, "data.batch_size": 32, "model.width": 4, "launch.nproc": 2},
        **{"log_every_steps": 1, "checkpoint.every_steps": 1},
    },
    "device": "cpu",
}


class Place:
    """A store, its jobs, and the dispatcher.

    Args:
        directory: in which they are.
        cores: that jobs get.
    """

    def __init__(self, directory: Path, cores: int = 2) -> None:
        self.jobs, self.models = directory / "jobs", directory / "models"
        self.log = directory / "dispatcher.log"
        self.store = Store(self.jobs)
        self._catalog = Catalog()
        self._cores = cores
        self._dispatcher: subprocess.Popen[bytes] | None = None

    def dispatch(self) -> None:
        """Start a dispatcher."""
        command = [sys.executable, "-m", "syncbn.jobs.dispatch.command", str(self.jobs)]
        command += ["--models", str(self.models), "--gpus", "0"]
        command += ["--cores", str(self._cores), "--oversubscribe"]
        with self.log.open("ab") as output:
            self._dispatcher = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def kill_dispatcher(self) -> None:
        """Kill it with SIGKILL, if there is one."""
        if self._dispatcher is not None:
            self._dispatcher.kill()
            self._dispatcher.wait()
            self._dispatcher = None

    def submit(self, submission: dict[str, Any], **more: Any) -> str:
        """Submit a job, and return its identifier."""
        specs = self._catalog.check({"name": "job", **submission, **more})
        return self.store.submit(specs, owner="anna")[0].id

    def submit_sweep(self, submission: dict[str, Any], **sweep: list[Any]) -> set[str]:
        """Submit the jobs of a sweep, and return their identifiers."""
        specs = self._catalog.check({"name": "job", **submission, "sweep": sweep})
        return {job.id for job in self.store.submit(specs, owner="anna", sweep_name="sweep")}

    def workspace(self, job: str) -> Workspace:
        return Workspace.of_job(self.jobs, job)

    def wait_for(self, jobs: Iterable[str], states: Iterable[State] = ENDED) -> list[Job]:
        """Return jobs when all of them are in one of some states."""
        wanted, waited = set(states), list(jobs)
        until(lambda: all(self.store.get(job).state in wanted for job in waited), self._describe)
        return [self.store.get(job) for job in waited]

    def wait_for_steps(self, job: str, steps: int) -> None:
        """Return when a job has written so many lines of steps."""
        file = self.workspace(job).run.steps_file
        until(lambda: file.exists() and file.read_bytes().count(b"\n") >= steps, self._describe)

    def processes(self, workspace: Workspace) -> list[int]:
        """Return the processes of a job, without the dispatcher.

        That opens the lock of a run to see whether it is held, and has it while it prepares the
        run.
        """
        dispatcher = self._dispatcher
        own = None if dispatcher is None else dispatcher.pid
        return [process for process in workspace.holders() if process != own]

    def supervisor(self, job: str) -> int:
        """Return the process that holds the others of a job."""
        holders = self.processes(self.workspace(job))
        (found,) = {os.getsid(process) for process in holders}
        assert found in holders
        return found

    def ranks(self, job: str) -> list[int]:
        """Return the other processes of a job."""
        supervisor = self.supervisor(job)
        return [process for process in self.processes(self.workspace(job)) if process != supervisor]

    def attempts(self, job: str) -> int:
        """Return how many attempts have begun to print."""
        return self.workspace(job).console.read_text(errors="replace").count("=== attempt ")

    def bundle(self, job: str) -> bytes:
        """Return the weights that a job ended with."""
        return (self.workspace(job).run.bundle_dir / "model.safetensors").read_bytes()

    def kill_jobs(self) -> None:
        """Kill the processes of all jobs, at once."""
        for directory in (self.jobs / "work").glob("*"):
            for process in self.processes(Workspace(directory)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """End everything."""
        self.kill_dispatcher()
        self.kill_jobs()
        self.store.close()

    def _describe(self) -> str:
        said = self.log.read_text()[-2000:] if self.log.exists() else ""
        jobs = self.store.select(limit=100).jobs
        return f"{[(job.id, job.state, job.reason) for job in jobs]}\n{said}"


@contextmanager
def never_twice(place: Place, jobs: Iterable[str]) -> Generator[None]:
    """Look all the time whether any job has processes of two supervisors, which must not be."""
    ended = threading.Event()
    watched = [place.workspace(job) for job in jobs]
    found: list[str] = []

    def look() -> None:
        while not ended.wait(0.02):
            for workspace in watched:
                sessions: set[int] = set()
                for process in place.processes(workspace):
                    with suppress(ProcessLookupError):
                        sessions.add(os.getsid(process))
                # One that waits for the lock in vain has not got it; so look for those who print.
                if len(sessions) > 1:
                    found.append(f"{workspace.directory.name}: {sessions}")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not found


def until(condition: Callable[[], bool], describe: Callable[[], str], timeout_s: float = 0) -> None:
    """Return when a condition holds; say what there is instead when its time is over."""
    deadline = time.monotonic() + (timeout_s or TIMEOUT_S)
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain; there is {describe()}"
        time.sleep(0.05)
