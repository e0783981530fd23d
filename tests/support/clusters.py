"""Jobs on clusters: a store, its dispatcher as a process, and what becomes of jobs."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.jobs.dispatch.command import attempt_of
from syncbn.jobs.engines.protocol import Attempt
from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.states import Action, State
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from tests.support.jobs import wait_until
from tests.support.processes import REPOSITORY

_TIMEOUT_S = 180
_SMALL: dict[str, Any] = {"model.width": 4, "epochs": 1, "launch.nproc": 2}


@dataclass(frozen=True)
class Place:
    """A store of jobs, which a cluster runs.

    Attributes:
        directory: of the store.
        store: of jobs.
        log: the file of what the dispatchers print.
        options: of the dispatcher.
        environment: of the dispatcher, besides that of this process.
        within: what its command is prefixed with.
    """

    directory: Path
    store: Store
    log: Path
    options: tuple[str, ...]
    environment: Mapping[str, str]
    within: tuple[str, ...] = ()

    def submit(self, *, retries: int = 0, cores: int = 2, **values: Any) -> str:
        """Submit a small job and return its identifier."""
        catalog = Catalog(JobSettings.read(self.directory))
        given = {"name": "job", "retries": retries, "cores": cores, "values": _SMALL | values}
        return self.store.submit(catalog.check(given), owner="anna")[0].id

    def submit_sweep(self, **values: Any) -> list[str]:
        """Submit a sweep of small jobs over seeds, and return their identifiers."""
        catalog = Catalog(JobSettings.read(self.directory))
        given = {"name": "sweep", "values": _SMALL | values, "sweep": {"seed": [0, 1, 2]}}
        jobs = self.store.submit(catalog.check(given), owner="anna", sweep_name="sweep")
        return [job.id for job in jobs]

    def endless(self, *, retries: int = 0) -> str:
        """Submit a job that has not ended when the test has."""
        return self.submit(retries=retries, epochs=10_000)

    def ask(self, job: str, action: Action) -> None:
        """Ask for something, as the service does."""
        self.store.request(job, action, by="anna")

    def job(self, job: str) -> Job:
        """Return what the store knows of a job."""
        return self.store.get(job)

    def attempt(self, job: str) -> Attempt:
        """Return a job's last attempt."""
        return attempt_of(self.directory, self.job(job))

    def workspace(self, job: str) -> Workspace:
        """Return where a job's files are."""
        return Workspace.of_job(self.directory, job)

    def console(self, job: str) -> str:
        """Return what a job printed."""
        file = self.workspace(job).console
        return file.read_text() if file.exists() else ""

    def wait_for(self, job: str, state: State, timeout_s: float = _TIMEOUT_S) -> Job:
        """Return a job once it is in a state."""
        self.wait_until(job, lambda: self.job(job).state == state, timeout_s)
        return self.job(job)

    def wait_for_epoch(self, job: str, epochs: int = 1) -> None:
        """Return once a job has trained, and has something to go on from."""
        metrics = self.workspace(job).run.read_metrics
        self.wait_until(job, lambda: len(metrics()) >= epochs)

    def wait_until(
        self, job: str, condition: Callable[[], bool], timeout_s: float = _TIMEOUT_S
    ) -> None:
        """Return once a condition holds; otherwise say what is known of a job."""
        try:
            wait_until(condition, timeout_s)
        except AssertionError as error:
            events = [(event.kind, event.data) for event in self.store.events_after(0, job=job)]
            log = self.log.read_text()
            known = f"{self.job(job)}\n{events}\n{self.console(job)}\n{log}"
            raise AssertionError(known) from error

    @contextmanager
    def dispatched(self) -> "Generator[subprocess.Popen[bytes]]":
        """Have a dispatcher run, and kill it in the end."""
        command = [
            sys.executable,
            "-m",
            "syncbn.jobs.dispatch.command",
            str(self.directory),
            *self.options,
        ]
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [*self.within, *command, "--until-stdin-closes"],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **self.environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@contextmanager
def place(
    directory: Path,
    *options: str,
    settings: str = "",
    within: Sequence[str] = (),
    **environment: str,
) -> "Generator[Place]":
    """Yield an empty store.

    Args:
        directory: in which it is made.
        *options: of its dispatcher.
        settings: of its administrator.
        within: what the command of its dispatcher is prefixed with.
        **environment: of its dispatcher.
    """
    jobs = directory / "jobs"
    jobs.mkdir()
    (jobs / "settings.toml").write_text(settings)
    store = Store(jobs)
    try:
        log = directory / "dispatcher.log"
        yield Place(jobs, store, log, options, environment, tuple(within))
    finally:
        store.close()
