"""The JSON bodies of the API of training jobs, for its description."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), extra="allow")


class Submission(_Body):
    """What is submitted: a job, or with `sweep` one for each combination. See /v1/options."""

    name: str | None = Field(default=None, description="what the job is called")
    choices: dict[str, str] = Field(default={}, description='of groups: {"norm": "sync"}')
    values: dict[str, Any] = Field(default={}, description='of keys: {"optim.lr": 0.05}')
    sweep: dict[str, list[Any]] = Field(
        default={}, description="a list for each key or group that varies"
    )
    publish: str | None = Field(default=None, description="the model's name when it is served")
    priority: int = Field(default=0, description="larger ones are started first")
    retries: int = Field(default=0, description="how often it is repeated if it was lost")
    cores: int | None = Field(default=None, description="that it gets; null: one a replica")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Progress(_Body):
    """How far a job is, as its trainer last said."""

    phase: str
    step: int
    total_steps: int | None = None
    fraction: float | None
    epoch: float | None = None
    epochs: float | None = None
    time_left_s: float | None = None
    images_per_s: float | None = None
    restarts: int = 0


class JobBody(_Body):
    """A job; times are Unix seconds."""

    kind: Literal["job"]
    id: str
    number: int
    name: str
    owner: str
    state: str
    reason_code: str | None
    reason: str
    wanted: str | None
    sweep: str | None
    sweep_values: dict[str, Any]
    choices: dict[str, str]
    values: dict[str, Any]
    publish: str | None
    published: list[dict[str, Any]]
    priority: int
    retries: int
    cores: int
    gpus: int
    device: str
    attempt: int
    waiting_for: str
    progress: Progress | None
    metrics: dict[str, Any] | None
    objective: float | None
    submitted: float
    started: float | None
    ended: float | None
    archived: bool
    actions: list[str]


class SweepBody(_Body):
    """Jobs that were submitted together."""

    kind: Literal["sweep"]
    id: str
    name: str
    jobs: list[JobBody]


class JobPage(_Body):
    """Some jobs; `next` is the cursor of the next page, and null on the last.

    Whoever gives `last_event` to /v1/events as Last-Event-ID misses nothing in between.
    """

    jobs: list[JobBody]
    next: str | None
    total: int
    counts: dict[str, int]
    last_event: str


class Transition(_Body):
    """A state that a job came to."""

    state: str
    time: float
    reason_code: str | None
    reason: str
    by: str | None


class EventBody(_Body):
    """Something else that happened to a job."""

    time: float
    kind: str
    data: dict[str, Any]


class Attempt(_Body):
    """How an attempt ended."""

    number: int
    started: float | None
    ended: float | None
    status: str
    reason_code: str
    reason: str
    exit_code: int


class Change(_Body):
    """A key of a job that is not the default."""

    default: Any
    value: Any


class JobDetail(JobBody):
    """All that is known of a job."""

    transitions: list[Transition]
    events: list[EventBody]
    attempts: list[Attempt]
    config: dict[str, Any]
    changed: dict[str, Change]


class Measurements(_Body):
    """What was measured, oldest first; numbers that are not finite are null."""

    metrics: list[dict[str, Any]]


class ComparedJob(_Body):
    """A job beside others."""

    id: str
    name: str
    state: str
    objective: float | None
    metrics: dict[str, Any]


class GroupBody(_Body):
    """Jobs that agree in some keys; a deviation is the sample's, and null of one job."""

    values: dict[str, Any]
    ids: list[str]
    n: int
    mean: dict[str, float]
    deviation: dict[str, float | None]


class Comparison(_Body):
    """Jobs side by side, and the keys in which they differ."""

    jobs: list[ComparedJob]
    keys: dict[str, dict[str, Any]]
    groups: list[GroupBody]


class Options(_Body):
    """What may be chosen, and who starts the jobs."""

    groups: dict[str, Any]
    values: list[dict[str, Any]]
    job: list[dict[str, Any]]
    limits: dict[str, Any]
    dispatcher: dict[str, Any] | None
