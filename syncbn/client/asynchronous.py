"""The client for asyncio, whose methods are awaited."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import httpx2

from syncbn.client import calls, programs
from syncbn.client.asking import ask
from syncbn.client.calls import Answer, JobSubmission, Selection, Submission
from syncbn.client.results import Comparison, Event, Job, Metrics, Options, Page, Sweep, Value
from syncbn.client.server import DEFAULT_URL, Server
from syncbn.client.steps import (
    Ask,
    Connect,
    Failure,
    Give,
    Pause,
    Program,
    Receive,
    Received,
    Series,
    Step,
)
from syncbn.client.transport import (
    BROKEN_OFF,
    as_answer,
    as_failure,
    as_request,
    client_options,
    is_event_stream,
)

T = TypeVar("T")


class AsyncJobsClient:
    """A service of training jobs, for asyncio: `JobsClient` with methods that are awaited.

    Those that iterate are iterated over by `async for`. To be used in one event loop.

    Args:
        url: as of `JobsClient`, and so are the others.
        key: one of the service's keys.
        timeout_s: within which a request is answered.
        retries: how often it is repeated at most.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        key: str | None = None,
        *,
        timeout_s: float = 30,
        retries: int = 3,
    ) -> None:
        self.server = Server(url, key, timeout_s, retries)
        self._http = httpx2.AsyncClient(**client_options(self.server))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to the service."""
        await self._http.aclose()

    @overload
    async def submit(
        self, *, sweep: Mapping[str, Sequence[Value]], **submission: Unpack[JobSubmission]
    ) -> Sweep: ...
    @overload
    async def submit(self, *, sweep: None = None, **submission: Unpack[JobSubmission]) -> Job: ...
    @overload
    async def submit(self, **submission: Unpack[Submission]) -> Job | Sweep: ...
    async def submit(self, **submission: Unpack[Submission]) -> Job | Sweep:
        """Submit a job or a sweep as `JobsClient.submit`."""
        return await self._run(ask(self.server, calls.submit(**submission)))

    def list(self, **selection: Unpack[Selection]) -> AsyncIterator[Job]:
        """Iterate over jobs as `JobsClient.list`."""
        return self._iterate(programs.pages(self.server, calls.select(**selection)))

    async def page(self, **selection: Unpack[Selection]) -> Page:
        """Return one page of jobs as `JobsClient.page`."""
        return await self._run(ask(self.server, calls.select(**selection)))

    async def show(self, job_id: str) -> Job:
        """Return a job with its transitions, attempts and configuration."""
        return await self._run(ask(self.server, calls.show(job_id)))

    async def cancel(self, job_id: str) -> Job:
        """Have a job write a checkpoint and end."""
        return await self._run(ask(self.server, calls.act(job_id, "cancel")))

    async def pause(self, job_id: str) -> Job:
        """Have a job write a checkpoint and leave its cores to others."""
        return await self._run(ask(self.server, calls.act(job_id, "pause")))

    async def resume(self, job_id: str, values: Mapping[str, Value] | None = None) -> Job:
        """Have a job go on from its last checkpoint as `JobsClient.resume`."""
        return await self._run(ask(self.server, calls.act(job_id, "resume", values=values)))

    async def retry(self, job_id: str) -> Job:
        """Have a job that has ended start again."""
        return await self._run(ask(self.server, calls.act(job_id, "retry")))

    async def publish(self, job_id: str, model: str | None = None) -> Job:
        """Have a finished job's model served as `JobsClient.publish`."""
        return await self._run(ask(self.server, calls.act(job_id, "publish", model=model)))

    async def archive(self, job_id: str) -> Job:
        """Have lists leave a job out that has ended, and its checkpoints removed."""
        return await self._run(ask(self.server, calls.act(job_id, "archive")))

    def log(
        self, job_id: str, *, offset: int = 0, attempt: int | None = None, follow: bool = False
    ) -> AsyncIterator[str]:
        """Iterate over the text of a job's log as `JobsClient.log`."""
        return self._iterate(programs.read_log(self.server, job_id, offset, attempt, follow))

    async def metrics(
        self, job_id: str, kind: Literal["epochs", "steps"] = "epochs", after: int | None = None
    ) -> Sequence[Metrics]:
        """Return a job's metrics as `JobsClient.metrics`."""
        return await self._run(ask(self.server, calls.metrics(job_id, kind, after)))

    def events(self, job_id: str | None = None, *, last_event_id: str = "") -> AsyncIterator[Event]:
        """Iterate over what happens as `JobsClient.events`."""
        return self._iterate(programs.follow_events(self.server, job_id, last_event_id))

    def watch(self, job_id: str) -> AsyncIterator[Job]:
        """Iterate over a job as it is, and whenever it has changed, until it has ended."""
        return self._iterate(programs.watch(self.server, job_id))

    def watch_sweep(self, sweep_id: str) -> AsyncIterator[tuple[Job, ...]]:
        """Iterate over all jobs of a sweep as `watch` does, until all have ended."""
        return self._iterate(programs.watch_sweep(self.server, sweep_id))

    async def wait(self, job_id: str, timeout_s: float) -> Job:
        """Return a job when it has ended as `JobsClient.wait`."""
        return await self._run(programs.wait(self.server, job_id, timeout_s))

    async def compare(self, ids: Sequence[str], by: Sequence[str] = ()) -> Comparison:
        """Return jobs side by side as `JobsClient.compare`."""
        return await self._run(ask(self.server, calls.compare(ids, by)))

    async def options(self) -> Options:
        """Return what may be submitted."""
        return await self._run(ask(self.server, calls.options()))

    async def _run(self, program: Program[T]) -> T:
        outcome: Any = None
        while True:
            try:
                step = program.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = await self._take(step)

    async def _iterate(self, series: Series[T]) -> AsyncIterator[T]:
        outcome: Any = None
        async with _Stream(self._http, self.server) as stream:
            while True:
                try:
                    step = series.send(outcome)
                except StopIteration:
                    return
                if isinstance(step, Give):
                    yield step.value
                    outcome = None
                elif isinstance(step, Connect):
                    outcome = await stream.connect(step)
                elif isinstance(step, Receive):
                    outcome = await stream.receive()
                else:
                    outcome = await self._take(step)

    async def _take(self, step: Step) -> Answer | Failure | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.duration_s)
            return None
        assert isinstance(step, Ask)
        request = as_request(self._http, step.call, step.timeout_s)
        try:
            # What limits each wait for the network does not limit their sum.
            async with asyncio.timeout(step.timeout_s):
                response = await self._http.send(request)
        except TimeoutError:
            return as_failure(httpx2.ReadTimeout("too slow"), step.timeout_s)
        except httpx2.RequestError as error:
            return as_failure(error, step.timeout_s)
        return as_answer(response, response.content)


class _Stream:
    """A connection that events come by; another takes its place when it breaks."""

    def __init__(self, http: httpx2.AsyncClient, server: Server) -> None:
        self._http, self._server = http, server
        self._response: httpx2.Response | None = None
        self._events: AsyncIterator[httpx2.ServerSentEvent] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._close()

    async def connect(self, step: Connect) -> Answer | Failure | None:
        await self._close()
        try:
            response = await self._http.send(
                as_request(self._http, step.call, step.timeout_s, step.silence_s), stream=True
            )
            self._response = response
            if is_event_stream(response):
                self._events = aiter(httpx2.EventSource(response))
                return None
            return as_answer(response, await response.aread())
        except httpx2.RequestError as error:
            return as_failure(error, self._server.timeout_s)

    async def receive(self) -> Received | Failure:
        assert self._events is not None
        try:
            event = await anext(self._events, None)
        except httpx2.RequestError as error:
            return as_failure(error, self._server.timeout_s)
        return BROKEN_OFF if event is None else Received(event.id, event.event, event.data)

    async def _close(self) -> None:
        if self._response is not None:
            await self._response.aclose()
