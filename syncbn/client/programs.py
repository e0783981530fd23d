"""What a client does beyond a single request, step by step: pages, logs, watching, events."""

import codecs
from typing import Any, TypeVar

import msgspec

from syncbn.client import calls
from syncbn.client.asking import ask, ask_through_outages, backoff_s, may_pass, result
from syncbn.client.calls import Answer, Call
from syncbn.client.results import (
    Event,
    Job,
    LogEvent,
    Metrics,
    MetricsEvent,
    Page,
    Progress,
    ProgressEvent,
    StateEvent,
)
from syncbn.client.server import Server
from syncbn.client.steps import Connect, Failure, Give, Pause, Program, Receive, Received, Series
from syncbn.errors import JobTimeoutError, ServerError

T = TypeVar("T")

# A job tells about once a second how far it is.
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.1, 1.0
_PAGE_JOBS = 200
# After which a stream is taken for dead: the service sends something every 15 seconds.
_SILENCE_S = 60.0


def pages(server: Server, first: Call[Page]) -> Series[Job]:
    """Give the jobs of a page, and of all that follow it."""
    call: Call[Page] | None = first
    while call is not None:
        page = yield from ask(server, call)
        for job in page.jobs:
            yield Give(job)
        call = _next(call, page)


def read_log(
    server: Server, job_id: str, offset: int, attempt: int | None, follow: bool
) -> Series[str]:
    """Give a job's log from a byte on; with follow, until the job has ended."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    has_ended, look_s = not follow, _FIRST_LOOK_S
    while True:
        part = yield from ask_through_outages(server, calls.log(job_id, offset, attempt))
        if text := decoder.decode(part.content):
            yield Give(text)
        is_longer, offset = part.next_offset > offset, max(offset, part.next_offset)
        if is_longer and offset < part.size:
            continue
        if has_ended:
            break
        # Asked before the log is read for the last time, so that its end is not missed.
        has_ended = (yield from ask_through_outages(server, calls.show(job_id))).has_ended
        if not has_ended:
            look_s = _FIRST_LOOK_S if is_longer else min(2 * look_s, _LONGEST_LOOK_S)
            yield Pause(look_s)
    if text := decoder.decode(b"", final=True):
        yield Give(text)


def watch(server: Server, job_id: str) -> Series[Job]:
    """Give a job, and again whenever it has changed, until it has ended."""
    job = yield from ask(server, calls.show(job_id))
    yield Give(job)
    look_s = _FIRST_LOOK_S
    while not job.has_ended:
        yield Pause(look_s)
        look_s = min(2 * look_s, _LONGEST_LOOK_S)
        before, job = job, (yield from ask_through_outages(server, calls.show(job_id)))
        if job != before:
            yield Give(job)


def watch_sweep(server: Server, sweep_id: str) -> Series[tuple[Job, ...]]:
    """Give all jobs of a sweep, and again whenever one has changed, until all have ended."""
    before: tuple[Job, ...] | None = None
    while True:
        jobs = yield from _sweep_jobs(server, sweep_id, is_known=before is not None)
        if jobs != before:
            yield Give(jobs)
        if all(job.has_ended for job in jobs):
            return
        before = jobs
        # Those of a large sweep take the service a while.
        yield Pause(max(_LONGEST_LOOK_S, len(jobs) / _PAGE_JOBS))


def wait(server: Server, job_id: str, timeout_s: float) -> Program[Job]:
    """Look at a job until it has ended.

    Raises:
        JobTimeoutError: it has not after that time, as far as is known.
    """
    deadline_s = server.clock() + timeout_s
    job = yield from ask(server, calls.show(job_id), deadline_s)
    look_s, outage = _FIRST_LOOK_S, ""
    while not job.has_ended:
        left_s = deadline_s - server.clock()
        if left_s <= 0:
            reason = f" ({job.reason})" if job.reason else ""
            raise JobTimeoutError(
                f"job {job_id} has not ended after {timeout_s:g} s: it is {job.state}{reason}, and "
                f"goes on; wait longer, or cancel it{outage}"
            )
        yield Pause(min(look_s, left_s))
        look_s = min(2 * look_s, _LONGEST_LOOK_S)
        if server.clock() >= deadline_s:
            continue
        try:
            job = yield from ask_through_outages(server, calls.show(job_id), deadline_s)
        except ServerError as error:
            if server.clock() < deadline_s:
                raise
            outage = f". That is what was known last: {error}"
    return job


def follow_events(server: Server, job_id: str | None, last_event_id: str) -> Series[Event]:
    """Give the events of a job until it has ended, or those of all jobs for ever.

    A connection that breaks is made again, from after the last event that came whole.
    """
    was_connected, heard_s, failures = False, server.clock(), 0
    while True:
        call = calls.events(job_id, last_event_id)
        outcome: Answer | Failure | None = yield Connect(call, server.timeout_s, _SILENCE_S)
        if outcome is None:
            was_connected, heard_s = True, server.clock()
            while isinstance(received := (yield Receive()), Received):
                heard_s, failures = server.clock(), 0
                last_event_id = received.id or last_event_id
                if received.kind == "end":
                    return
                event = _event(server, call, received)
                if event is not None:
                    yield Give(event)
        else:
            has_patience = (
                server.clock() - heard_s < server.outage_s
                if was_connected
                else failures < server.retries
            )
            if not (has_patience and may_pass(outcome)):
                result(server, call, outcome)
        yield Pause(backoff_s(failures))
        failures += 1


def _next(call: Call[Page], page: Page) -> Call[Page] | None:
    """Return the request for the page after one."""
    if page.next is None or ("cursor", page.next) in call.query:
        return None
    others = [pair for pair in call.query if pair[0] != "cursor"]
    return Call(call.method, call.path, call.read, [*others, ("cursor", page.next)])


def _sweep_jobs(server: Server, sweep_id: str, is_known: bool) -> Program[tuple[Job, ...]]:
    """Return all jobs of a sweep as they were submitted."""
    found: list[Job] = []
    call: Call[Page] | None = calls.select(sweep=sweep_id, limit=_PAGE_JOBS)
    while call is not None:
        page = yield from (ask_through_outages if is_known else ask)(server, call)
        found += page.jobs
        call = _next(call, page)
    return tuple(sorted(found, key=lambda job: job.number))


class _Told(msgspec.Struct):
    """What an event of progress holds."""

    id: str
    progress: Progress | None = None
    metrics: Metrics | None = None


class _Logged(msgspec.Struct):
    """What an event of the log holds."""

    offset: int
    text: str


def _event(server: Server, call: Call[Any], received: Received) -> Event | None:
    """Return an event as a value; None for a kind that a later service has."""
    number, data = received.id, received.data
    try:
        match received.kind:
            case "state":
                return StateEvent(id=number, job=msgspec.json.decode(data, type=Job))
            case "progress":
                told = msgspec.json.decode(data, type=_Told)
                return ProgressEvent(
                    id=number, job_id=told.id, progress=told.progress, metrics=told.metrics
                )
            case "metrics":
                metrics = msgspec.json.decode(data, type=Metrics)
                return MetricsEvent(id=number, metrics=metrics)
            case "log":
                logged = msgspec.json.decode(data, type=_Logged)
                return LogEvent(id=number, offset=logged.offset, text=logged.text)
            case _:
                return None
    except msgspec.MsgspecError as error:
        said = f"an event {received.kind}; {error}"
        raise server.misunderstood(200, f"{call.method} {call.path}", said) from None
