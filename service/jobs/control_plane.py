"""The control plane: from a submission or an action to the store of jobs; no HTTP in it."""

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from service.auth import Identity
from service.errors import (
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    StoreError,
)
from service.jobs.comparison import MAX_JOBS, Compared, compare, config_of
from service.jobs.console import Piece, read_piece
from service.jobs.curves import Curves
from service.jobs.descriptions import (
    attempt_bodies,
    changed_keys,
    dispatcher_body,
    job_body,
    may_change,
    note_bodies,
    transition_bodies,
)
from service.jobs.measurements import best_epoch, read_lines
from service.metrics import Metrics
from syncbn.errors import (
    JobActionError,
    JobError,
    JobLimitError,
    JobNotFoundError,
    JobStoreError,
    SubmissionError,
)
from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.states import Action, State
from syncbn.jobs.store.database import FILE
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 8
_MAX_EVENTS = 1000


@dataclass(frozen=True)
class Selection:
    """Which jobs are asked for; all that is None or empty does not matter.

    Attributes:
        states: in one of these.
        name: called exactly so.
        sweep: of this sweep.
        text: with this somewhere in them.
        owner: of this one.
        archived: those that were put away, instead of the others.
    """

    states: Sequence[State] = ()
    name: str | None = None
    sweep: str | None = None
    text: str | None = None
    owner: str | None = None
    archived: bool = False


class ControlPlane:
    """Answers requests about training jobs.

    Its methods read and write files, and wait for other processes that do: `ask` calls them from
    the event loop. It has threads of its own, so that jobs never keep models from answering.

    Args:
        directory: of the store.
        timeout_s: longest wait for one answer.

    Raises:
        JobSettingsError: the administrator's file is not valid.
    """

    def __init__(self, directory: Path, *, timeout_s: float) -> None:
        self.directory = directory
        self.curves = Curves()
        self._catalog = Catalog(JobSettings.read(directory))
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs")
        self._store: Store | None = None
        self._opened: tuple[int, int] | None = None
        self._opening = threading.Lock()

    async def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a function returns that may block, called in a thread.

        Raises:
            ServiceError: what `syncbn.jobs` says of the request or the store, in the service's
                words, or there was no answer in time.
        """
        context = contextvars.copy_context()
        call = partial(context.run, partial(function, *args, **kwargs))
        try:
            return await asyncio.wait_for(
                asyncio.get_running_loop().run_in_executor(self._threads, call), self._timeout_s
            )
        except TimeoutError:
            raise StoreError(
                f"the store of jobs did not answer within {self._timeout_s:g} s"
            ) from None
        except JobNotFoundError as error:
            raise NotFoundError(str(error)) from error
        except JobActionError as error:
            raise ConflictError(str(error)) from error
        except JobLimitError as error:
            raise LimitError(str(error)) from error
        except SubmissionError as error:
            raise InvalidRequestError(str(error)) from error
        except (JobStoreError, OSError) as error:
            raise StoreError(f"the store of jobs cannot be used now: {error}") from error
        except JobError as error:
            raise InvalidRequestError(str(error)) from error

    def close(self) -> None:
        """Let go of the store; what is being asked is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None

    def store(self) -> Store:
        """Return the store, opened again if another file has taken its place.

        Raises:
            JobStoreError: it cannot be opened, or its file is gone.
        """
        with self._opening:
            signature = self._sign()
            if signature is None and self._opened is not None:
                # An empty one in its place would hide that all jobs are gone.
                raise JobStoreError(
                    f"{self.directory / FILE} is gone; put it or a copy there, or start again "
                    "without it"
                )
            if self._store is None or signature != self._opened:
                if self._store is not None:
                    self._store.close()
                self._store = None
                self._store = Store(self.directory)
                self._opened = self._sign()
            return self._store

    def _sign(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.directory / FILE)  # noqa: PTH116 -- a path object costs as much
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def submit(
        self, submission: Mapping[str, Any], identity: Identity, idempotency_key: str | None
    ) -> dict[str, Any]:
        """Store a job, or the jobs of a sweep, and return it in the API's words.

        Raises:
            JobError: as `Catalog.check` and `Store.submit`.
        """
        specs, limits = self._catalog.check(submission), self._catalog.settings.limits
        name = None
        if submission.get("sweep"):  # whose jobs are called NAME-1 and so on
            name = submission.get("name") or specs[0].name.rpartition("-")[0]
        jobs = self.store().submit(
            specs,
            owner=identity.label,
            sweep_name=name,
            idempotency_key=idempotency_key,
            max_waiting=limits.waiting_jobs,
            max_disk_bytes=limits.disk_bytes,
        )
        bodies = [job_body(job, identity) for job in jobs]
        if name is None:
            return bodies[0]
        return {"kind": "sweep", "id": jobs[0].sweep, "name": name, "jobs": bodies}

    def select(
        self, selection: Selection, identity: Identity, *, cursor: str | None, limit: int
    ) -> dict[str, Any]:
        """Return a page of jobs, newest first, and how many there are in each state.

        Raises:
            JobError: as `Store.select`.
        """
        store = self.store()
        last_event = store.last_event()  # first, so that whoever follows from here misses nothing
        page = store.select(
            states=selection.states,
            name=selection.name,
            sweep=selection.sweep,
            text=selection.text,
            owner=selection.owner,
            archived=selection.archived,
            cursor=cursor,
            limit=limit,
        )
        return {
            "jobs": [job_body(job, identity) for job in page.jobs],
            "next": page.next,
            "total": page.total,
            "counts": store.counts(archived=selection.archived),
            "last_event": str(last_event),
        }

    def get(self, job: str) -> Job:
        """Return a job.

        Raises:
            JobNotFoundError: there is none of that identifier.
        """
        return self.store().get(job)

    def workspace(self, job: str) -> Workspace:
        """Return the files of a job.

        Raises:
            JobNotFoundError: there is none of that identifier, which else could be any path.
        """
        return Workspace.of_job(self.directory, self.get(job).id)

    def detail(self, job: str, identity: Identity) -> dict[str, Any]:
        """Return all that is known of a job.

        Raises:
            JobNotFoundError: there is none of that identifier.
        """
        store = self.store()
        found = store.get(job)
        run = Workspace.of_job(self.directory, found.id).run
        events = store.events_after(0, job=found.id, limit=_MAX_EVENTS)
        return {
            **job_body(found, identity),
            "transitions": transition_bodies(events),
            "events": note_bodies(events),
            "attempts": attempt_bodies(run.read_attempts()),
            "config": config_of(found, run.config_file),
            "changed": changed_keys(found, self._catalog.options()),
        }

    def log(self, job: str, offset: int, limit_bytes: int, attempt: int | None) -> Piece:
        """Return a part of a job's log, as `read_piece`.

        Raises:
            JobNotFoundError: there is no such job.
            NotFoundError: it had no such attempt.
        """
        try:
            return read_piece(self.workspace(job).console, offset, limit_bytes, attempt)
        except JobNotFoundError:
            raise
        except LookupError:
            raise NotFoundError(f"job {job[:40]} has no attempt {attempt} in its log") from None

    def measurements(
        self, job: str, kind: Literal["epochs", "steps"], limit: int, after: float | None
    ) -> list[dict[str, Any]]:
        """Return what a job measured, as `read_lines`.

        Raises:
            JobNotFoundError: there is no such job.
        """
        run = self.workspace(job).run
        file = run.metrics_file if kind == "epochs" else run.steps_file
        return read_lines(file, limit=limit, after=after)

    def act(
        self, job: str, action: Action, identity: Identity, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Ask for something to be done with a job, and return the job as it is now.

        Args:
            job: its identifier.
            action: what is asked for.
            identity: who asks.
            arguments: {"values": {…}} for resume, {"model": name} for publish, else none.

        Raises:
            ForbiddenError: it is somebody else's.
            JobError: as `Store.request`, or the arguments are not valid.
        """
        store = self.store()
        found = store.get(job)
        if not may_change(identity, found):
            raise ForbiddenError(
                f"job {found.id} is {found.owner}'s, and you are {identity.label}: only its owner "
                "and keys with the scope admin may change it"
            )
        limits = self._catalog.settings.limits
        asked = store.request(
            found.id,
            action,
            by=identity.label,
            arguments=self._arguments(found, action, arguments),
            max_waiting=limits.waiting_jobs,
            max_disk_bytes=limits.disk_bytes,
        )
        return job_body(asked, identity)

    def _arguments(
        self, job: Job, action: Action, arguments: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return what a request of a job may say, after it has passed the allow-list."""
        known = {Action.resume: "values", Action.publish: "model"}.get(action)
        unknown = sorted(set(arguments) - {known})
        if unknown:
            valid = f"only {known}" if known else "nothing"
            raise SubmissionError(f"{unknown[0][:80]}: {action} takes {valid} in its body")
        said = arguments.get(known) if known else None
        if said is None:
            return {}
        if action == Action.publish:
            (spec,) = self._catalog.check({"publish": said})
            return {"model": spec.publish}
        if not isinstance(said, dict):
            raise SubmissionError(f"values={said!r}: must be an object, such as {{'epochs': 20}}")
        spec = self._catalog.changed(replace(job.spec, values=job.values), said)
        return {key: spec.values[key] for key in said}

    def compare(self, jobs: Sequence[str], by: Sequence[str] | None) -> dict[str, Any]:
        """Return jobs side by side.

        Raises:
            JobError: there is no such job, or there are too many.
        """
        chosen = list(dict.fromkeys(jobs))
        if not 0 < len(chosen) <= MAX_JOBS:
            raise SubmissionError(f"ids: name 1 to {MAX_JOBS} jobs, got {len(chosen)}")
        return compare([self._compared(self.get(job)) for job in chosen], by)

    def _compared(self, job: Job) -> Compared:
        run = Workspace.of_job(self.directory, job.id).run
        lines = read_lines(run.metrics_file, limit=100_000)
        result = run.read_result()
        tested = {} if result is None else result.metrics
        tests = {key: value for key, value in tested.items() if key.startswith("test_")}
        return Compared(job, config_of(job, run.config_file), {**best_epoch(lines), **tests})

    def measure(self, metrics: Metrics) -> None:
        """Note what there is to be seen of the jobs, be it that their store cannot be read."""
        try:
            store = self.store()
            counts, about = store.counts(), store.dispatcher()
        except (JobStoreError, OSError):
            metrics.jobs({}, {}, {"store": False})
            return
        said = dispatcher_body(about, time.time())
        total, free = (0, 0) if about is None else (about.cores, about.free_cores)
        metrics.jobs(
            {state: counts.get(state, 0) for state in State},
            {"free": free, "busy": total - free},
            {"store": True, "dispatcher": said is not None and said["alive"]},
        )

    def options(self) -> dict[str, Any]:
        """Return what may be chosen, and who starts the jobs.

        Raises:
            JobStoreError: the store cannot be read.
        """
        about = dispatcher_body(self.store().dispatcher(), time.time())
        return {**self._catalog.options(), "dispatcher": about}
