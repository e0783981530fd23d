"""Dynamic batching: requests that wait for one model are answered by one forward."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import ClientGoneError, ModelFailedError, OverloadedError, QueueFullError

log = logging.getLogger(__name__)

Array = NDArray[np.float32]
Answer = NDArray[Any]
# Of the time that a forward of the waiting rows takes, the most that they are held back for more.
_WAIT_SHARE = 0.25
_MAX_WAIT_S = 0.02
# By how much the number of clients that are at it is forgotten with every batch.
_FORGET = 0.9


class Observer(Protocol):
    """What is told of a batcher's work, on the event loop's thread."""

    def queue_changed(self, rows: int) -> None:
        """So many rows wait now."""

    def batch_started(self, waited_s: Sequence[float], rows: int) -> None:
        """A batch leaves the queue; each of its requests has waited so long."""

    def batch_finished(self, forward_s: float) -> None:
        """The batch's forward took so long."""


class ForwardTimes:
    """How long a forward of so many rows takes: measured at warm-up, then followed.

    Args:
        measured: seconds by rows, at least one; between them, the time is interpolated.
    """

    def __init__(self, measured: dict[int, float]) -> None:
        self._rows = sorted(measured)
        self._seconds = [measured[rows] for rows in self._rows]

    def of(self, rows: int) -> float:
        """Return the expected seconds of a forward of `rows` rows."""
        return float(np.interp(rows, self._rows, self._seconds))

    def saw(self, rows: int, seconds: float) -> None:
        """Let the nearest size follow what a forward took, slowly, as machines are noisy."""
        near = min(range(len(self._rows)), key=lambda at: abs(math.log(self._rows[at] / rows)))
        ratio = min(max(seconds / self._seconds[near], 0.5), 2.0)
        self._seconds[near] *= 1 + 0.1 * (ratio - 1)


@dataclass(slots=True, eq=False)
class _Entry:
    samples: Array
    compute: Callable[[Array], Answer]
    rows: int
    answer: "asyncio.Future[Answer]"
    is_gone: Callable[[], bool] | None
    arrived_s: float
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """Answers requests for one model, in batches of whole requests, in the order of their arrival.

    While a forward runs, requests gather, and go together next. When the model is idle, a batch is
    held back only while more requests are likely to come: until as many wait as clients were at it
    lately, and for a quarter of the forward's time at the most. A lone client never waits.

    Without an executor, forwards run on the event loop itself, which suits models whose largest
    batch takes less than handing it to a thread is worth; what the sockets hold already is read
    first, as long as there is any.

    Args:
        predict: from samples (rows, *shape) float32 to answers (rows, *); may raise anything.
        times: how long it takes.
        executor: computes the forwards, one at a time; None: the event loop does.
        max_rows: of one forward, and so of one request.
        max_queue_rows: that may wait; more are refused.
        observer: told of queue, batches and times.
        computed: called with the first request's samples of every batch where it was computed, and
            after its answers have left.
        name: of the model, for messages.
    """

    def __init__(
        self,
        predict: Callable[[Array], Answer],
        times: ForwardTimes,
        *,
        executor: Executor | None,
        max_rows: int,
        max_queue_rows: int,
        observer: Observer,
        computed: Callable[[Array], None],
        name: str,
    ) -> None:
        self._predict = predict
        self._times = times
        self._executor = executor
        self._max_rows = max_rows
        self._max_queue_rows = max_queue_rows
        self._observer = observer
        self._computed = computed
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()  # some of whose answers nobody waits for any more
        self._waiting = self._waiting_rows = 0  # of those whose answers somebody waits for
        self._running: list[_Entry] = []
        self._clients = 1.0
        self._handle: asyncio.Handle | None = None
        self._seen = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting_rows(self) -> int:
        """How many samples wait now."""
        return self._waiting_rows

    async def predict(
        self,
        samples: Array,
        deadline_s: float,
        is_gone: Callable[[], bool] | None = None,
        compute: Callable[[Array], Answer] | None = None,
    ) -> Answer:
        """Return the model's answer to some samples, alone or together with others'.

        Cancelling it takes the samples out of the queue.

        Args:
            samples: shape (rows, *shape), float32, of 1 to `max_rows` rows.
            deadline_s: the latest time for the answer, by the event loop's clock.
            is_gone: whether nobody waits any more; asked before the samples are computed.
            compute: what answers them instead of the batcher's `predict`; only requests with the
                same share a batch.

        Returns:
            What it makes of the samples, (rows, *); what is not finite is returned as it is.

        Raises:
            QueueFullError: too many samples wait already.
            OverloadedError: the deadline passed.
            ClientGoneError: `is_gone` said so.
            ModelFailedError: the model raised an exception on these very samples.
        """
        rows = len(samples)
        assert 0 < rows <= self._max_rows
        if self._waiting_rows + rows > self._max_queue_rows:
            self._drop_gone()
            if self._waiting_rows + rows > self._max_queue_rows:
                batches = self._waiting_rows / self._max_rows
                raise QueueFullError(
                    f"{self._waiting_rows} samples wait for {self._name!r} already, of at most "
                    f"{self._max_queue_rows}; try again later",
                    max(1, math.ceil(batches * self._times.of(self._max_rows))),
                )
        loop = self._loop
        answer: asyncio.Future[Answer] = loop.create_future()
        entry = _Entry(samples, compute or self._predict, rows, answer, is_gone, loop.time())
        entry.timer = loop.call_at(deadline_s, self._expire, entry)
        self._queue.append(entry)
        self._waiting += 1
        self._waiting_rows += rows
        self._idle.clear()
        self._consider()
        try:
            return await answer
        finally:
            entry.timer.cancel()
            if entry.rows:  # it is still in the queue, and nobody waits for its answer
                self._forget(entry)

    async def close(self, deadline_s: float) -> None:
        """Wait until everything that was asked is answered; refuse what is not by the deadline.

        Args:
            deadline_s: by the event loop's clock.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            for entry in (*self._running, *self._queue):
                self._expire(entry)

    def _expire(self, entry: _Entry) -> None:
        if not entry.answer.done():
            waited_s = self._loop.time() - entry.arrived_s
            entry.answer.set_exception(
                OverloadedError(
                    f"no answer from {self._name!r} within {waited_s:.3g} s; try again later"
                )
            )
        if entry.rows:
            self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        """Take an entry out of the counts; it goes from the queue when its turn comes."""
        self._waiting -= 1
        self._waiting_rows -= entry.rows
        entry.rows = 0
        entry.samples = entry.samples[:0].copy()  # or the request's whole body stayed in memory
        if not self._waiting:
            self._queue.clear()
            self._observer.queue_changed(0)
            if not self._running:
                self._idle.set()

    def _drop_gone(self) -> None:
        for entry in [entry for entry in self._queue if entry.rows]:
            if entry.is_gone is not None and entry.is_gone():
                if not entry.answer.done():
                    entry.answer.set_exception(ClientGoneError("the client went away"))
                self._forget(entry)

    def _consider(self) -> None:
        """Start a batch now, or see to it that one starts in time."""
        if self._running or not self._waiting:
            return
        if self._executor is None:
            if self._handle is None:
                self._seen = self._waiting
                self._handle = self._loop.call_soon(self._start_when_quiet)
        elif self._waiting_rows >= self._max_rows or self._waiting + 0.5 > self._clients:
            self._start()
        elif self._handle is None:
            wait_s = min(_WAIT_SHARE * self._times.of(self._waiting_rows), _MAX_WAIT_S)
            self._handle = self._loop.call_later(wait_s, self._start)

    def _start_when_quiet(self) -> None:
        """Start once the sockets have no more, since each request costs less in a larger batch."""
        if self._seen < self._waiting and self._waiting_rows < self._max_rows:
            self._seen = self._waiting
            self._handle = self._loop.call_soon(self._start_when_quiet)
        else:
            self._start()

    def _start(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        batch, rows = self._take()
        if not batch:
            if not self._waiting:
                self._idle.set()
            return
        now_s = self._loop.time()
        self._observer.queue_changed(self._waiting_rows)
        self._observer.batch_started([now_s - entry.arrived_s for entry in batch], rows)
        self._running = batch
        requests = [entry.samples for entry in batch]
        compute = batch[0].compute
        if self._executor is None:
            self._finish(rows, *self._timed_answers(compute, requests))
            self._loop.call_soon(self._computed, requests[0])  # the answers leave before it
        else:
            self._executor.submit(self._work, compute, requests, rows)

    def _take(self) -> tuple[list[_Entry], int]:
        """Return the next batch, as many of the first in the queue as go together, and its rows."""
        batch: list[_Entry] = []
        rows = 0
        while self._queue and rows + self._queue[0].rows <= self._max_rows:
            entry = self._queue.popleft()
            if not entry.rows:
                continue
            if entry.is_gone is not None and entry.is_gone():
                entry.answer.set_exception(ClientGoneError("the client went away"))
                self._forget(entry)
                continue
            if batch and entry.compute != batch[0].compute:
                self._queue.appendleft(entry)
                break
            batch.append(entry)
            rows += entry.rows
            self._waiting -= 1
            self._waiting_rows -= entry.rows
            entry.rows = 0
        return batch, rows

    def _work(self, compute: Callable[[Array], Answer], requests: list[Array], rows: int) -> None:
        """Compute a batch on the executor's thread, and bring the answers to the event loop."""
        answers, seconds = self._timed_answers(compute, requests)
        self._loop.call_soon_threadsafe(self._finish, rows, answers, seconds)
        self._computed(requests[0])

    def _timed_answers(
        self, compute: Callable[[Array], Answer], requests: list[Array]
    ) -> tuple[list[Answer | Exception], float]:
        """Return each request's answer, or why it has none, and the seconds that it took."""
        start_s = time.perf_counter()
        answers = self._answers(compute, requests)
        return answers, time.perf_counter() - start_s

    def _answers(
        self, compute: Callable[[Array], Answer], requests: list[Array]
    ) -> list[Answer | Exception]:
        samples = requests[0] if len(requests) == 1 else np.concatenate(requests)
        try:
            together = compute(samples)
        except Exception as error:  # whatever a model makes of its input
            if len(requests) == 1:
                log.error("model %s failed", self._name, exc_info=error)
                return [error]
            # Halves, until the request that the model fails on is alone: it fails alone.
            middle = len(requests) // 2
            return [
                answer
                for half in (requests[:middle], requests[middle:])
                for answer in self._answers(compute, half)
            ]
        answers: list[Answer | Exception] = []
        first = 0
        for request in requests:
            answers.append(together[first : first + len(request)])
            first += len(request)
        return answers

    def _finish(self, rows: int, answers: list[Answer | Exception], seconds: float) -> None:
        batch, self._running = self._running, []
        self._times.saw(rows, seconds)
        self._clients = max(len(batch) + self._waiting, self._clients * _FORGET)
        self._observer.batch_finished(seconds)
        for entry, answer in zip(batch, answers, strict=True):
            if entry.answer.done():
                continue
            if isinstance(answer, Exception):
                entry.answer.set_exception(
                    ModelFailedError(
                        f"model {self._name!r} failed on this input; the server's log says more"
                    )
                )
            else:
                entry.answer.set_result(answer)
        if self._waiting:
            self._consider()
        else:
            self._idle.set()
