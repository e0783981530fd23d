"""A job as it is stored, and what happened to it."""

from dataclasses import dataclass, field
from typing import Any

from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import State


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is known of a job; times are Unix seconds.

    Attributes:
        id: names it for good.
        number: counts all jobs, from 1.
        name: what its user calls it.
        owner: the label of the key that it was submitted with.
        state: where it is.
        reason_code: why it is there, for programs; None while nothing is to be said.
        reason: the same as a sentence.
        wanted: the state that a user asked for, until the job is there or that is refused; or
            None.
        sweep: the sweep that it belongs to, or None.
        sweep_values: what tells it from the other jobs of its sweep.
        spec: what was submitted.
        cores: how many cores it takes while it runs.
        gpus: how many GPUs.
        device: where its ranks compute: cpu or cuda, or auto while that is not decided.
        attempt: the number of its last attempt; 0 before the first.
        failures: how often in a row its replicas failed by themselves, in earlier attempts.
        handle: what the engine knows the attempt by.
        placement: the cores and GPUs of the attempt, as {"cores": [...], "gpus": [...]}; of one
            that an engine has in an array also "array", what that is called, and "task".
        arguments: what a user asked for on top of the submission, such as more epochs.
        published: where its model was published, as {"model": name, "version": number} each.
        progress: the trainer's last word, and under "metrics" its last line of metrics; or None.
        objective: what a sweep minimizes; None if there is none.
        submitted, queued, started, ended: when it came there last; None if it did not.
        archived: whether it was put away, and its files removed.
        waiting_for: what a queued job waits for, as a phrase; else empty.
    """

    id: str
    number: int
    name: str
    owner: str
    state: State
    reason_code: str | None
    reason: str
    wanted: State | None
    sweep: str | None
    sweep_values: dict[str, Any]
    spec: JobSpec
    cores: int
    gpus: int
    device: str
    attempt: int
    failures: int
    handle: str
    placement: dict[str, Any]
    arguments: dict[str, Any]
    published: list[dict[str, Any]]
    progress: dict[str, Any] | None
    objective: float | None
    submitted: float
    queued: float | None
    started: float | None
    ended: float | None
    archived: bool
    waiting_for: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """What was set at the submission, and since then."""
        return {**self.spec.values, **self.arguments}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What decides how long the files of a job stay; small, as there may be many.

    Attributes:
        id, number, state, archived: as of `Job`.
        ended: when it did, in Unix seconds; None if it has not, or never said so.
        is_published: whether its model is served.
    """

    id: str
    number: int
    state: State
    archived: bool
    ended: float | None
    is_published: bool


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; events are added and never changed.

    Attributes:
        number: counts all events.
        job: whose.
        time: when, in Unix seconds.
        kind: "state", "request", "published" or "note".
        data: what: of a state, {"state", "reason_code", "reason", "by"}.
    """

    number: int
    job: str
    time: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a user asked of a job, until the dispatcher has done it."""

    number: int
    job: str
    action: str
    arguments: dict[str, Any]
    by: str


@dataclass(frozen=True)
class Sweep:
    """Jobs that were submitted together."""

    id: str
    name: str
    owner: str
    submitted: float


@dataclass(frozen=True)
class Page:
    """Some of the jobs that a question is about, newest first.

    Attributes:
        jobs: of this page.
        next: where the next page begins; None if this is the last.
        total: how many jobs there are on all pages.
    """

    jobs: list[Job]
    next: str | None
    total: int


@dataclass(frozen=True)
class DispatcherInfo:
    """Who starts the jobs of a store.

    Attributes:
        pid: its process.
        host: the machine.
        engine: where it runs jobs.
        cores: how many cores it gives to jobs.
        gpus: how many GPUs.
        free_cores: how many of them no job has.
        free_gpus: likewise.
        since: when it began, in Unix seconds.
        seen: when it was last heard of, likewise.
    """

    pid: int
    host: str
    engine: str
    cores: int
    gpus: int
    free_cores: int
    free_gpus: int
    since: float
    seen: float
    options: dict[str, Any] = field(default_factory=dict[str, Any])
