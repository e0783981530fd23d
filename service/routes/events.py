"""What happens to training jobs, as streams of server-sent events."""

from collections.abc import AsyncGenerator, AsyncIterable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.jobs.streams import AllWatch, JobWatch, Streams, Watch
from service.routes.asking import Asker, Plane
from service.routes.responses import refusals

router = APIRouter(tags=["jobs"], prefix="/v1")
_REFUSALS = refusals(400, 401, 403, 404, 429, 503)
_LastEventId = Annotated[
    str, Header(max_length=80, description="the id of the last event that was read; none: begin")
]

_Until = Annotated[
    Literal["end"] | None,
    Query(description="end: the stream ends with the job; without, it waits for it to be resumed"),
]


async def _streams(request: Request) -> AsyncGenerator[Streams]:
    """Give the streams, with a place among them for as long as the answer takes."""
    streams: Streams = request.app.state.streams
    with streams:
        yield streams


_Place = Annotated[Streams, Depends(_streams)]


# Before the answer begins, so that a job that is not there is a 404.
async def _all(plane: Plane, asker: Asker, last_event_id: _LastEventId = "") -> Watch:
    return await plane.ask(AllWatch, plane, asker, last_event_id)


async def _one(
    plane: Plane,
    asker: Asker,
    id: str,
    until: _Until = None,
    last_event_id: _LastEventId = "",
) -> Watch:
    return await plane.ask(JobWatch, plane, asker, id, last_event_id, until == "end")


@router.get("/events", response_class=EventSourceResponse, responses=_REFUSALS)
async def events(
    plane: Plane, streams: _Place, watch: Annotated[Watch, Depends(_all)]
) -> AsyncIterable[ServerSentEvent]:
    """Tell of all jobs from now on, or from Last-Event-ID on.

    `state`, whose data is the job as in a list; `progress`, {"id", "progress", "metrics"}. Every 15
    seconds without an event there is a comment. If the store fails, `error` is the last event.
    """
    async for event in streams.follow(plane, watch):
        yield event


@router.get("/jobs/{id}/events", response_class=EventSourceResponse, responses=_REFUSALS)
async def job_events(
    plane: Plane, streams: _Place, watch: Annotated[Watch, Depends(_one)]
) -> AsyncIterable[ServerSentEvent]:
    """Tell of one job, from Last-Event-ID on; without, its state, metrics and the log's end first.

    As for all jobs; also `metrics`, a line of what was measured at an epoch, and `log`, {"offset",
    "text"}. After a job went on from an earlier state, lines of epochs may come again. With
    `until=end`, `end` is the last event, once the job has ended and everything is told.
    """
    async for event in streams.follow(plane, watch):
        yield event
