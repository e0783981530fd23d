"""What happens to jobs, as events for those who watch: where each watcher is, and what is new."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from fastapi.sse import ServerSentEvent

from service.auth import Identity
from service.errors import InvalidRequestError, ServiceError, TooManyStreamsError
from service.jobs.console import read_piece
from service.jobs.control_plane import ControlPlane
from service.jobs.descriptions import job_body, progress_body
from service.jobs.measurements import parse_line
from syncbn.jobs.job import Job
from syncbn.jobs.states import ACTIVE, ENDED
from syncbn.jobs.workspace import Workspace

_PERIOD_S = 0.25
# Of all jobs, progress is told as often as trainers tell it.
_PROGRESS_PERIODS = 4
_MAX_EVENTS = 500
_MAX_JOBS = 500
_PIECE_BYTES = 1 << 16
_END = "end"
_encode = msgspec.json.Encoder().encode


class Watch(Protocol):
    """Knows what one watcher was told already."""

    def news(self) -> tuple[list[ServerSentEvent], bool]:
        """Return what happened since the last call, and whether there is more; may block."""
        ...


class Streams:
    """How many watch, and whether they have to go.

    Args:
        limit: how many may watch at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Have all streams end; called in the event loop."""
        self._closing.set()

    def __enter__(self) -> None:
        """Take a place.

        Raises:
            TooManyStreamsError: there is none.
        """
        if self._open >= self._limit:
            raise TooManyStreamsError(
                f"{self._open} streams of events are open, and no more may be: try again later, or "
                "ask for the job itself now and then"
            )
        self._open += 1

    def __exit__(self, *unused: object) -> None:
        self._open -= 1

    async def follow(self, plane: ControlPlane, watch: Watch) -> AsyncIterator[ServerSentEvent]:
        """Give what happens until the service stops, the watch is over, or the store fails.

        The last two are told.

        Args:
            plane: calls the watch in its threads.
            watch: knows what is new.
        """
        while not self._closing.is_set():
            try:
                events, more = await plane.ask(watch.news)
            except ServiceError as error:
                yield _event("error", {"error": str(error)})
                return
            for event in events:
                yield event
            if events and events[-1].event == _END:
                return
            if more:
                continue
            try:
                async with asyncio.timeout(_PERIOD_S):
                    await self._closing.wait()
            except TimeoutError:
                pass


class AllWatch:
    """What happens to all jobs: their states, and the progress of those that run.

    Args:
        plane: answers.
        identity: who watches.
        last_id: the header Last-Event-ID; empty: what happens from now on.

    Raises:
        InvalidRequestError: the header is none of ours.
        ServiceError: as `ControlPlane.store`.
    """

    def __init__(self, plane: ControlPlane, identity: Identity, last_id: str) -> None:
        self._plane = plane
        self._identity = identity
        self._number = _numbers(last_id, 1)[0] if last_id else plane.store().last_event()
        self._said: dict[str, Any] = {}
        self._turn = 0

    def news(self) -> tuple[list[ServerSentEvent], bool]:
        """Return a state for each job to which something happened, and what progress there is."""
        store = self._plane.store()
        # A copy of the store, put in its place, may have fewer events than were told.
        self._number = min(self._number, store.last_event())
        found = store.events_after(self._number, limit=_MAX_EVENTS)
        last = {event.job: event.number for event in found}  # of several of a job, the last counts
        events = [
            _event("state", job_body(store.get(job), self._identity), str(number))
            for job, number in last.items()
        ]
        if found:
            self._number = found[-1].number
        if self._turn % _PROGRESS_PERIODS == 0:
            events += self._progress()
        self._turn += 1
        return events, len(found) == _MAX_EVENTS

    def _progress(self) -> list[ServerSentEvent]:
        page = self._plane.store().select(states=sorted(ACTIVE), limit=_MAX_JOBS)
        before, self._said = self._said, {job.id: job.progress for job in page.jobs}
        return [
            _progress(job)
            for job in page.jobs
            if job.progress is not None and before.get(job.id) != job.progress
        ]


@dataclass
class _Position:
    """How far a file was told of."""

    offset: int
    inode: int | None = None

    def look(self, file: Path) -> int:
        """Return how long a file is; what was told counts no more if it was written anew."""
        try:
            status = file.stat()
        except OSError:
            return 0
        if status.st_size < self.offset or self.inode not in (None, status.st_ino):
            self.offset = 0
        self.inode = status.st_ino
        return status.st_size


class JobWatch:
    """What happens to one job: state, progress, new lines of metrics, and what is added to its log.

    Args:
        plane: answers.
        identity: who watches.
        job: its identifier.
        last_id: the header Last-Event-ID; empty: all metrics and the log's end, and then the rest.
        until_end: whether it is over when the job has ended and all is told.

    Raises:
        InvalidRequestError: the header is none of ours.
        JobNotFoundError: there is no such job.
        ServiceError: as `ControlPlane.store`.
    """

    def __init__(
        self,
        plane: ControlPlane,
        identity: Identity,
        job: str,
        last_id: str,
        until_end: bool = False,
    ) -> None:
        self._plane = plane
        self._identity = identity
        self._until_end = until_end
        self._id = plane.get(job).id
        workspace = Workspace.of_job(plane.directory, self._id)
        self._metrics_file, self._console = workspace.run.metrics_file, workspace.console
        self._said: Any = None
        if last_id:
            self._number, metrics, log = _numbers(last_id, 3)
        else:
            self._number = -1  # so that the state as it is comes first
            metrics, log = 0, read_piece(self._console, -_PIECE_BYTES, 0).start
        self._metrics, self._log = _Position(metrics), _Position(log)

    def news(self) -> tuple[list[ServerSentEvent], bool]:
        """Return the state if something happened, then progress, metrics and what was logged."""
        store = self._plane.store()
        self._number = min(self._number, store.last_event())
        found = store.events_after(max(0, self._number), job=self._id, limit=_MAX_EVENTS)
        # After the events, so that it is never older than they are.
        job = store.get(self._id)
        events: list[ServerSentEvent] = []
        if found or self._number < 0:
            self._number = found[-1].number if found else 0
            events.append(self._event("state", job_body(job, self._identity)))
        if job.progress is not None and job.progress != self._said:
            self._said = job.progress
            events.append(_progress(job))
        lines, more_lines = self._lines()
        text, more_text = self._text()
        events += lines + text
        more = more_lines or more_text or len(found) == _MAX_EVENTS
        # A job that had ended before its files were looked at writes no more.
        if self._until_end and job.state in ENDED and not more:
            events.append(self._event(_END, {"state": job.state}))
        return events, more

    def _lines(self) -> tuple[list[ServerSentEvent], bool]:
        size_bytes = self._metrics.look(self._metrics_file)
        if size_bytes <= self._metrics.offset:
            return [], False
        with self._metrics_file.open("rb") as stream:
            stream.seek(self._metrics.offset)
            piece = stream.read(_PIECE_BYTES)
        whole, newline, _ = piece.rpartition(b"\n")
        if not newline and len(piece) == _PIECE_BYTES:  # no trainer writes such a line
            self._metrics.offset += len(piece)
            return [], True
        events: list[ServerSentEvent] = []
        for text in (whole + newline).splitlines(keepends=True):
            self._metrics.offset += len(text)
            if (line := parse_line(text)) is not None:
                events.append(self._event("metrics", line))
        return events, bool(newline) and size_bytes > self._metrics.offset

    def _text(self) -> tuple[list[ServerSentEvent], bool]:
        size_bytes = self._log.look(self._console)
        if size_bytes <= self._log.offset:
            return [], False
        piece = read_piece(self._console, self._log.offset, _PIECE_BYTES)
        self._log.offset = piece.end
        told = {"offset": piece.start, "text": piece.text.decode(errors="replace")}
        return [self._event("log", told)], piece.end < piece.size_bytes

    def _event(self, kind: str, data: Mapping[str, Any]) -> ServerSentEvent:
        position = f"{max(0, self._number)}.{self._metrics.offset}.{self._log.offset}"
        return _event(kind, data, position)


def _progress(job: Job) -> ServerSentEvent:
    # Without an identifier, as whoever comes back is told the newest anyway.
    return _event("progress", {"id": job.id, **progress_body(job)})


def _event(kind: str, data: Mapping[str, Any], number: str | None = None) -> ServerSentEvent:
    # Not by FastAPI's encoder, which takes 20 times as long.
    return ServerSentEvent(event=kind, raw_data=_encode(data).decode(), id=number)


def _numbers(last_id: str, count: int) -> list[int]:
    parts = last_id.split(".")
    if len(parts) != count or not all(
        part.isascii() and part.isdigit() and len(part) < 19 for part in parts
    ):
        raise InvalidRequestError(
            f"Last-Event-ID {last_id[:40]!r} is not of this stream; leave it out to begin anew"
        )
    return [int(part) for part in parts]
