"""The client whose methods return when the service has answered."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
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


class JobsClient:
    """A service of training jobs.

    Every method may raise `syncbn.errors.ServerError`, whose `status` is that of the answer, or
    None if there was none. Requests that can do no harm twice are repeated when the service cannot
    be reached or is busy, within `timeout_s`: all that only read, and `submit`, which is known by
    its idempotency key. Redirections are not followed, so that the key gets to no other host.
    Several threads may use a client at once.

    Args:
        url: of the service, such as https://train.example.org.
        key: one of its keys; None: it wants none.
        timeout_s: within which a request is answered.
        retries: how often it is repeated at most.

    Raises:
        SubmissionError: an argument is not valid.
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
        self._http = httpx2.Client(**client_options(self.server))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the service."""
        self._http.close()

    @overload
    def submit(
        self, *, sweep: Mapping[str, Sequence[Value]], **submission: Unpack[JobSubmission]
    ) -> Sweep: ...
    @overload
    def submit(self, *, sweep: None = None, **submission: Unpack[JobSubmission]) -> Job: ...
    @overload
    def submit(self, **submission: Unpack[Submission]) -> Job | Sweep: ...
    def submit(self, **submission: Unpack[Submission]) -> Job | Sweep:
        """Submit a job, or with `sweep` one for each combination of its values.

        Args:
            **submission: name, choices, values, sweep, publish, priority, retries, cores, device,
                idempotency_key; see `syncbn.client.Submission`.
        """
        return self._run(ask(self.server, calls.submit(**submission)))

    def list(self, **selection: Unpack[Selection]) -> Iterator[Job]:
        """Iterate over jobs, the newest first, page after page as they are needed.

        Args:
            **selection: states, name, sweep, text, owner, archived, cursor, limit (of a page); see
                `syncbn.client.Selection`.
        """
        return self._iterate(programs.pages(self.server, calls.select(**selection)))

    def page(self, **selection: Unpack[Selection]) -> Page:
        """Return one page of jobs, with how many there are.

        Args:
            **selection: as of `list`.
        """
        return self._run(ask(self.server, calls.select(**selection)))

    def show(self, job_id: str) -> Job:
        """Return a job with its transitions, attempts and configuration."""
        return self._run(ask(self.server, calls.show(job_id)))

    def cancel(self, job_id: str) -> Job:
        """Have a job write a checkpoint and end."""
        return self._run(ask(self.server, calls.act(job_id, "cancel")))

    def pause(self, job_id: str) -> Job:
        """Have a job write a checkpoint and leave its cores to others."""
        return self._run(ask(self.server, calls.act(job_id, "pause")))

    def resume(self, job_id: str, values: Mapping[str, Value] | None = None) -> Job:
        """Have a job go on from its last checkpoint.

        Args:
            job_id: a paused, cancelled or failed job; or a finished one with new values.
            values: what changes, such as {"epochs": 20}.
        """
        return self._run(ask(self.server, calls.act(job_id, "resume", values=values)))

    def retry(self, job_id: str) -> Job:
        """Have a job that has ended start again."""
        return self._run(ask(self.server, calls.act(job_id, "retry")))

    def publish(self, job_id: str, model: str | None = None) -> Job:
        """Have a finished job's model served.

        Args:
            job_id: the job.
            model: which it becomes the next version of; None: as the job says.
        """
        return self._run(ask(self.server, calls.act(job_id, "publish", model=model)))

    def archive(self, job_id: str) -> Job:
        """Have lists leave a job out that has ended, and its checkpoints removed."""
        return self._run(ask(self.server, calls.act(job_id, "archive")))

    def log(
        self, job_id: str, *, offset: int = 0, attempt: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Iterate over the text of a job's log.

        Args:
            job_id: the job.
            offset: from which byte on.
            attempt: of this attempt alone; None: of all.
            follow: until the job has ended, not only as long as the log is now.
        """
        return self._iterate(programs.read_log(self.server, job_id, offset, attempt, follow))

    def metrics(
        self, job_id: str, kind: Literal["epochs", "steps"] = "epochs", after: int | None = None
    ) -> Sequence[Metrics]:
        """Return a job's metrics, a mapping for each epoch or for some steps.

        Args:
            job_id: the job.
            kind: which lines.
            after: only those after so many.
        """
        return self._run(ask(self.server, calls.metrics(job_id, kind, after)))

    def events(self, job_id: str | None = None, *, last_event_id: str = "") -> Iterator[Event]:
        """Iterate over what happens to a job until it has ended, or to all jobs for ever.

        A connection that breaks is made again, and nothing is missed; only after a minute without
        the service this is an error.

        Args:
            job_id: the job; None: all.
            last_event_id: after which event.
        """
        return self._iterate(programs.follow_events(self.server, job_id, last_event_id))

    def watch(self, job_id: str) -> Iterator[Job]:
        """Iterate over a job as it is, and whenever it has changed, until it has ended."""
        return self._iterate(programs.watch(self.server, job_id))

    def watch_sweep(self, sweep_id: str) -> Iterator[tuple[Job, ...]]:
        """Iterate over all jobs of a sweep as `watch` does, until all have ended."""
        return self._iterate(programs.watch_sweep(self.server, sweep_id))

    def wait(self, job_id: str, timeout_s: float) -> Job:
        """Return a job when it has ended, also if it failed.

        Raises:
            JobTimeoutError: it has not after that time. It goes on.
        """
        return self._run(programs.wait(self.server, job_id, timeout_s))

    def compare(self, ids: Sequence[str], by: Sequence[str] = ()) -> Comparison:
        """Return jobs side by side.

        Args:
            ids: the jobs.
            by: keys by which they are grouped; none: all but the seed.
        """
        return self._run(ask(self.server, calls.compare(ids, by)))

    def options(self) -> Options:
        """Return what may be submitted."""
        return self._run(ask(self.server, calls.options()))

    def _run(self, program: Program[T]) -> T:
        outcome: Any = None
        while True:
            try:
                step = program.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = self._take(step)

    def _iterate(self, series: Series[T]) -> Iterator[T]:
        outcome: Any = None
        with _Stream(self._http, self.server) as stream:
            while True:
                try:
                    step = series.send(outcome)
                except StopIteration:
                    return
                if isinstance(step, Give):
                    yield step.value
                    outcome = None
                elif isinstance(step, Connect):
                    outcome = stream.connect(step)
                elif isinstance(step, Receive):
                    outcome = stream.receive()
                else:
                    outcome = self._take(step)

    def _take(self, step: Step) -> Answer | Failure | None:
        if isinstance(step, Pause):
            time.sleep(step.duration_s)
            return None
        assert isinstance(step, Ask)
        deadline_s = time.monotonic() + step.timeout_s
        request = as_request(self._http, step.call, step.timeout_s)
        content = bytearray()
        try:
            with closing(self._http.send(request, stream=True)) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    # What limits each wait for the network does not limit their sum.
                    if time.monotonic() > deadline_s:
                        raise httpx2.ReadTimeout("too slow", request=request)
        except httpx2.RequestError as error:
            return as_failure(error, step.timeout_s)
        return as_answer(response, bytes(content))


class _Stream:
    """A connection that events come by; another takes its place when it breaks."""

    def __init__(self, http: httpx2.Client, server: Server) -> None:
        self._http, self._server = http, server
        self._response: httpx2.Response | None = None
        self._events: Iterator[httpx2.ServerSentEvent] = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def connect(self, step: Connect) -> Answer | Failure | None:
        self._close()
        try:
            response = self._http.send(
                as_request(self._http, step.call, step.timeout_s, step.silence_s), stream=True
            )
            self._response = response
            if is_event_stream(response):
                self._events = iter(httpx2.EventSource(response))
                return None
            return as_answer(response, response.read())
        except httpx2.RequestError as error:
            return as_failure(error, self._server.timeout_s)

    def receive(self) -> Received | Failure:
        try:
            event = next(self._events, None)
        except httpx2.RequestError as error:
            return as_failure(error, self._server.timeout_s)
        return BROKEN_OFF if event is None else Received(event.id, event.event, event.data)

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
