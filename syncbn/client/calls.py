"""Requests of the service, each as a value made by a function, with how its answer is read.

Nothing is sent here, so that the two clients share all of it.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NoReturn, TypedDict, TypeVar, Unpack

import msgspec

from syncbn.client.results import Comparison, Job, Lines, Metrics, Options, Page, Sweep, Value
from syncbn.errors import JobNotFoundError, SubmissionError

T = TypeVar("T")
LOG_BYTES = 1 << 18  # that are asked for at once


@dataclass(frozen=True)
class Answer:
    """What the service answered.

    Attributes:
        status: such as 200.
        headers: by their names in lower case.
        content: the body.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request.

    Attributes:
        method: of HTTP.
        path: below the service's URL.
        read: what makes the result of a successful answer; raises a ValueError if it cannot.
        query: pairs of name and value.
        body: JSON, or None.
        headers: besides those of every request.
        is_repeatable: whether it does no harm if the service gets it twice.
    """

    method: str
    path: str
    read: Callable[[Answer], T]
    query: Sequence[tuple[str, str]] = ()
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    is_repeatable: bool = True


@dataclass(frozen=True)
class LogPart:
    """A part of a job's log.

    Attributes:
        content: its bytes; a letter may be cut at either end.
        next_offset: where it goes on.
        size: of the log as it is now.
    """

    content: bytes
    next_offset: int
    size: int


class JobSubmission(TypedDict, total=False):
    """What may be said of a new job; what is left out, or None, is left to the service.

    Attributes:
        name: of the job.
        choices: of groups, such as {"norm": "sync"}.
        values: of keys, such as {"optim.lr": 0.05}.
        publish: the model that it becomes a version of when it finishes.
        priority: from -100 to 100; higher ones start first.
        retries: how often it is started again after a failure that may pass.
        cores: how many it gets.
        device: where it computes.
        idempotency_key: a name of this submission, if it may be made twice: by the same name, the
            service makes its jobs once.
    """

    name: str | None
    choices: Mapping[str, str]
    values: Mapping[str, Value]
    publish: str | None
    priority: int | None
    retries: int | None
    cores: int | None
    device: Literal["auto", "cpu", "cuda"] | None
    idempotency_key: str | None


class Submission(JobSubmission, total=False):
    """What may be said of a new job, or of those of a sweep.

    Attributes:
        sweep: lists of values of keys or groups; one job is made for each combination.
    """

    sweep: Mapping[str, Sequence[Value]] | None


class Selection(TypedDict, total=False):
    """Which jobs are meant; all that is said must fit.

    Attributes:
        states: in one of these.
        name: of this name.
        sweep: of the sweep of this identifier.
        text: with this text in what was submitted.
        owner: of this owner.
        archived: archived ones too.
        cursor: after the page that ended with it.
        limit: how many jobs a page has at most.
    """

    states: Sequence[str]
    name: str | None
    sweep: str | None
    text: str | None
    owner: str | None
    archived: bool
    cursor: str | None
    limit: int | None


def submit(**submission: Unpack[Submission]) -> Call[Job | Sweep]:
    """Return the request for a new job, or for those of a sweep.

    Without an idempotency key, it gets one that nobody else has, by which the service knows its
    repetitions.

    Raises:
        SubmissionError: a number is not finite.
    """
    said = {key: value for key, value in submission.items() if value not in (None, {})}
    headers = {"Idempotency-Key": str(said.pop("idempotency_key", secrets.token_hex(16)))}
    return Call("POST", "/v1/jobs", _read_submitted, body=_json(said), headers=headers)


def select(**selection: Unpack[Selection]) -> Call[Page]:
    """Return the request for a page of jobs."""
    query = [("state", state) for state in selection.get("states", ())]
    for key, value in selection.items():
        if key != "states" and value not in (None, False):
            query.append((key, "true" if value is True else str(value)))
    return Call("GET", "/v1/jobs", _read_page, query)


def show(job_id: str) -> Call[Job]:
    """Return the request for a job with all that is known of it."""
    return Call("GET", _path(job_id), _read_job)


def act(job_id: str, action: str, **arguments: Any) -> Call[Job]:
    """Return the request for an action: cancel, pause, resume, retry, publish or archive."""
    given = {key: value for key, value in arguments.items() if value is not None}
    path = f"{_path(job_id)}/{action}"
    return Call("POST", path, _read_job, body=_json(given), is_repeatable=False)


def log(job_id: str, offset: int, attempt: int | None) -> Call[LogPart]:
    """Return the request for a part of a job's log."""
    query = [("offset", str(offset)), ("limit", str(LOG_BYTES))]
    if attempt is not None:
        query.append(("attempt", str(attempt)))
    return Call("GET", f"{_path(job_id)}/log", _read_log, query, headers={"Accept": "text/plain"})


def metrics(job_id: str, kind: str, after: int | None) -> Call[tuple[Metrics, ...]]:
    """Return the request for lines of metrics."""
    query = [("kind", kind), ("format", "json")]
    if after is not None:
        query.append(("after", str(after)))
    return Call("GET", f"{_path(job_id)}/metrics", _read_lines, query)


def events(job_id: str | None, last_event_id: str) -> Call[NoReturn]:
    """Return the request for the events of a job, or of all, after one."""
    path = "/v1/events" if job_id is None else f"{_path(job_id)}/events"
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_event_id:
        headers["Last-Event-ID"] = last_event_id
    query = [] if job_id is None else [("until", "end")]
    return Call("GET", path, _read_whole_stream, query, headers=headers)


def compare(ids: Sequence[str], by: Sequence[str]) -> Call[Comparison]:
    """Return the request for a comparison of jobs."""
    query = [("ids", ",".join(map(_checked_id, ids)))]
    if by:
        query.append(("by", ",".join(by)))
    return Call("GET", "/v1/jobs/compare", _read_comparison, query)


def options() -> Call[Options]:
    """Return the request for what may be submitted."""
    return Call("GET", "/v1/options", _read_options)


def _path(job_id: str) -> str:
    return f"/v1/jobs/{_checked_id(job_id)}"


def _checked_id(job_id: str) -> str:
    # Anything else could ask for another path.
    if re.fullmatch(r"[A-Za-z0-9_-]+", job_id) is None:
        raise JobNotFoundError(
            f"{job_id!r} is no identifier of a job, such as k3v9x0q2ma; syncbn-jobs list shows them"
        )
    return job_id


def _json(value: Any) -> bytes:
    _check_finite(value)
    return msgspec.json.encode(value)


def _check_finite(value: Any, key: str = "") -> None:
    """Refuse numbers that JSON does not have, which would be sent as null."""
    if isinstance(value, float) and not (value - value == 0):
        raise SubmissionError(f"{key}={value}: must be a finite number")
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_finite(each, str(name))
    elif isinstance(value, list | tuple):
        for each in value:
            _check_finite(each, key)


def _reads(kind: type[T]) -> Callable[[Answer], T]:
    decoder = msgspec.json.Decoder(kind)
    return lambda answer: decoder.decode(answer.content)


_read_job, _read_page = _reads(Job), _reads(Page)
_read_comparison, _read_options = _reads(Comparison), _reads(Options)
_SUBMITTED: msgspec.json.Decoder[Job | Sweep] = msgspec.json.Decoder(Job | Sweep)
_LINES = msgspec.json.Decoder(Lines)


def _read_submitted(answer: Answer) -> Job | Sweep:
    return _SUBMITTED.decode(answer.content)


def _read_lines(answer: Answer) -> tuple[Metrics, ...]:
    return _LINES.decode(answer.content).metrics


def _read_log(answer: Answer) -> LogPart:
    try:
        numbers = [int(answer.headers[name]) for name in ("x-log-offset", "x-log-size")]
    except KeyError as error:
        raise ValueError(f"there is no header {error}") from None
    return LogPart(answer.content, *numbers)


def _read_whole_stream(answer: Answer) -> NoReturn:
    """Refuse an answer that should have been a stream, which is read as it comes."""
    raise ValueError("not text/event-stream")
