"""What the service tells of jobs, as typed values.

All are frozen, and times are Unix seconds. What a later service adds is passed over; what a service
leaves out has a default.
"""

from typing import Any, TypeAlias

import msgspec

Value: TypeAlias = bool | int | float | str | list[bool | int | float | str | None] | None
Metrics: TypeAlias = dict[str, float | None]

ENDED = ("finished", "failed", "cancelled", "lost")


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is.

    Attributes:
        phase: loading, training, evaluating, recalibrating, exporting, publishing, stopping, done.
        step: optimizer steps done.
        total_steps: of the whole job.
        fraction: of them, from 0 to 1; None while the total is not known.
        epoch: passes over the training data done.
        epochs: of the whole job.
        time_left_s: as estimated; None while nothing is known.
        images_per_s: of training.
        restarts: how often its replicas were started again in place, in this attempt.
    """

    phase: str = ""
    step: int = 0
    total_steps: int | None = None
    fraction: float | None = None
    epoch: float | None = None
    epochs: float | None = None
    time_left_s: float | None = None
    images_per_s: float | None = None
    restarts: int = 0


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A state that a job came into: when, why, and who wanted it."""

    state: str
    time: float
    reason_code: str | None = None
    reason: str = ""
    by: str | None = None


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something else that happened to a job: what was asked for, published or refused."""

    kind: str
    time: float
    data: dict[str, Any] = {}


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt at a job, counted from 1, and how it ended if it has."""

    number: int
    started: float | None = None
    ended: float | None = None
    status: str | None = None
    reason_code: str | None = None
    reason: str | None = None
    exit_code: int | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A value that is not the default."""

    default: Value = None
    value: Value = None


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a model that the service got from a job."""

    model: str
    version: int | str


class Job(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="job"):
    """A job as it is now.

    Attributes:
        id: by which it is asked for.
        number: counted by the service from its first job.
        name: not unique.
        owner: the label of the key that it was submitted with.
        state: submitted, queued, starting, running, stopping, paused, finished, failed, cancelled
            or lost.
        reason_code: why it is in that state, for programs.
        reason: the same as a sentence.
        wanted: the state that somebody asked for, until it is there.
        sweep: identifier of the sweep that it is a job of.
        sweep_values: its values of what the sweep varies.
        choices: what was submitted, by groups.
        values: what was submitted, by keys.
        publish: the model that it becomes a version of when it finishes.
        published: what it became.
        priority: from -100 to 100; higher ones start first.
        retries: how often it is started again after a failure that may pass.
        cores: how many it gets.
        gpus: how many it gets.
        device: auto, cpu or cuda.
        attempt: the number of the last attempt; 0 before the first.
        waiting_for: what a job in the queue waits for.
        progress: None before it started.
        metrics: the newest ones of an epoch.
        objective: what a sweep minimizes; None before there is one.
        submitted: when.
        started: when, for the first time.
        ended: when.
        archived: whether lists leave it out unless asked.
        actions: what may be asked of it now.
        transitions: through which it came here; empty in lists, as are the following.
        events: what else happened to it.
        attempts: all of them.
        config: the whole configuration by dotted keys.
        changed: what of it is not the default.
    """

    id: str
    name: str
    state: str
    number: int = 0
    owner: str = ""
    reason_code: str | None = None
    reason: str | None = None
    wanted: str | None = None
    sweep: str | None = None
    sweep_values: dict[str, Value] = {}
    choices: dict[str, str] = {}
    values: dict[str, Value] = {}
    publish: str | None = None
    published: tuple[Published, ...] = ()
    priority: int = 0
    retries: int = 0
    cores: int | None = None
    gpus: int | None = None
    device: str = "auto"
    attempt: int = 0
    waiting_for: str | None = None
    progress: Progress | None = None
    metrics: Metrics | None = None
    objective: float | None = None
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    archived: bool = False
    actions: tuple[str, ...] = ()
    transitions: tuple[Transition, ...] = ()
    events: tuple[Note, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    config: dict[str, Value] = {}
    changed: dict[str, Change] = {}

    @property
    def has_ended(self) -> bool:
        """Whether it is finished, failed, cancelled or lost, and nobody wants it to go on."""
        return self.state in ENDED and self.wanted in (None, *ENDED)


class Sweep(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="sweep"):
    """Jobs that were submitted together, one for each combination of values."""

    id: str
    name: str = ""
    jobs: tuple[Job, ...] = ()


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the jobs that were asked for.

    Attributes:
        jobs: in the service's order, the newest first.
        next: what to ask for the following ones with; None after the last.
        total: how many there are on all pages.
        counts: how many of all jobs are in each state.
        last_event: after which `events` misses nothing that happens from now on.
    """

    jobs: tuple[Job, ...]
    next: str | None = None
    total: int = 0
    counts: dict[str, int] = {}
    last_event: str = ""


class Lines(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of metrics, one an epoch or one for some steps."""

    metrics: tuple[Metrics, ...]


class ComparedJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a job of a comparison came to."""

    id: str
    name: str = ""
    state: str = ""
    objective: float | None = None
    metrics: Metrics | None = None


class ComparedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that agree in some values: means and standard deviations of their metrics.

    Attributes:
        values: in which they agree.
        ids: the jobs.
        n: how many they are.
        mean: of each metric.
        deviation: of the sample; None of a single job.
    """

    values: dict[str, Value] = {}
    ids: tuple[str, ...] = ()
    n: int = 0
    mean: Metrics = {}
    deviation: Metrics = {}


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs side by side.

    Attributes:
        jobs: in the order in which they were asked for.
        keys: the values of each key in which they differ, by the jobs' identifiers.
        groups: the jobs by the keys that were asked for, or by all of these but the seed.
    """

    jobs: tuple[ComparedJob, ...]
    keys: dict[str, dict[str, Value]] = {}
    groups: tuple[ComparedGroup, ...] = ()


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A value that may be set: its name with dots, type, range, default and what it does.

    Attributes:
        type: integer, number, boolean, string, enum or list.
        form: what a text must look like, in words.
        max_items: the most items of a list.
    """

    key: str
    type: str = "string"
    nullable: bool = False
    default: Value = None
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None
    choices: tuple[Value, ...] = ()
    form: str = ""
    max_items: int | None = None
    help: str = ""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a group, and the values that it brings."""

    help: str = ""
    values: tuple[Key, ...] = ()


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A group of which one choice is made."""

    default: str = ""
    help: str = ""
    choices: dict[str, Choice] = {}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What may be submitted.

    Attributes:
        groups: by their names.
        values: the keys of no group.
        job: what is said of a job besides its training, such as its priority.
        limits: of the service, such as the jobs of a sweep.
        dispatcher: who starts the jobs, with which cores and GPUs; None if nobody does.
    """

    groups: dict[str, Group]
    values: tuple[Key, ...] = ()
    job: tuple[Key, ...] = ()
    limits: dict[str, Any] = {}
    dispatcher: dict[str, Any] | None = None


class StateEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A job came into a state, or something of it has changed."""

    id: str
    job: Job


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A job told how far it is."""

    id: str
    job_id: str
    progress: Progress | None = None
    metrics: Metrics | None = None


class MetricsEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A job wrote a line of metrics."""

    id: str
    metrics: Metrics


class LogEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A job's log got longer: by this text, from this byte on."""

    id: str
    offset: int
    text: str


Event: TypeAlias = StateEvent | ProgressEvent | MetricsEvent | LogEvent
