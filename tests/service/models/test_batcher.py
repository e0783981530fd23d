import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ClientGoneError, ModelFailedError, OverloadedError, QueueFullError
from service.models.batcher import Array, Batcher, ForwardTimes

LONG_S = 30.0


class Records:
    """An observer, and what it was told."""

    def __init__(self) -> None:
        self.queued: list[int] = []
        self.batches: list[tuple[int, int]] = []

    def queue_changed(self, rows: int) -> None:
        self.queued.append(rows)

    def batch_started(self, waited_s: Sequence[float], rows: int) -> None:
        assert all(each >= 0 for each in waited_s)
        self.batches.append((len(waited_s), rows))

    def batch_finished(self, forward_s: float) -> None:
        assert forward_s >= 0


class Model:
    """Doubles its samples; refuses some, and can be held."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.started = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, samples: Array) -> Array:
        self.sizes.append(len(samples))
        self.started.set()
        assert self.go_on.wait(LONG_S)
        if (samples == -1).any():
            raise ValueError("not this one")
        return samples * 2


def _run(
    work: Callable[[Batcher, Model, Records], Awaitable[Any]],
    *,
    inline: bool = False,
    max_rows: int = 8,
    max_queue_rows: int = 1000,
    forward_s: float = 0.001,
) -> Any:
    async def run() -> Any:
        model, records = Model(), Records()
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(
                model,
                ForwardTimes({1: forward_s, max_rows: forward_s}),
                executor=None if inline else executor,
                max_rows=max_rows,
                max_queue_rows=max_queue_rows,
                observer=records,
                computed=lambda samples: None,
                name="doubler",
            )
            try:
                async with asyncio.timeout(LONG_S):
                    result = await work(batcher, model, records)
                    await batcher.close(_now() + LONG_S)
                    assert batcher.waiting_rows == 0
                    return result
            finally:
                model.go_on.set()

    return asyncio.run(run())


def _now() -> float:
    return asyncio.get_running_loop().time()


def _rows(*values: float) -> Array:
    return np.array(values, np.float32)[:, None]


def _ask(
    batcher: Batcher,
    samples: Array,
    timeout_s: float = LONG_S,
    is_gone: Callable[[], bool] | None = None,
) -> "asyncio.Task[Array]":
    return asyncio.create_task(batcher.predict(samples, _now() + timeout_s, is_gone))


async def _held(batcher: Batcher, model: Model) -> "asyncio.Task[Array]":
    """Return a request that the model computes until it may go on."""
    model.go_on.clear()
    first = _ask(batcher, _rows(0))
    while not model.started.is_set():
        await asyncio.sleep(0.001)
    model.sizes.clear()
    return first


@pytest.mark.parametrize("inline", [False, True])
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_every_request_gets_its_own_answer_and_no_batch_is_too_large(
    inline: bool, sizes: list[int]
) -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        requests = [_rows(*np.random.default_rng(n).random(n)) for n in sizes]
        answers = await asyncio.gather(*(_ask(batcher, each) for each in requests))
        for request, answer in zip(requests, answers, strict=True):
            np.testing.assert_array_equal(answer, request * 2)
        assert max(model.sizes) <= 8
        assert sum(model.sizes) == sum(sizes)
        assert [rows for _, rows in records.batches] == model.sizes
        assert sum(requests for requests, _ in records.batches) == len(sizes)

    _run(work, inline=inline)


def test_what_gathers_during_a_forward_goes_together_next_in_order() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        others = [_ask(batcher, _rows(*[n] * rows)) for n, rows in enumerate((3, 4, 2, 6))]
        await asyncio.sleep(0)
        assert batcher.waiting_rows == 15
        model.go_on.set()
        await asyncio.gather(first, *others)
        assert model.sizes == [7, 8]

    _run(work)


def test_lone_client_never_waits_for_others() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        for n in range(20):
            await _ask(batcher, _rows(n))
        assert model.sizes == [1] * 20

    # If it waited, it would take a quarter of a minute each time, and so time out.
    _run(work, forward_s=1e9)


def test_clients_of_lately_are_waited_for() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        others = [_ask(batcher, _rows(n)) for n in range(3)]
        await asyncio.sleep(0)
        model.go_on.set()
        await asyncio.gather(first, *others)
        model.sizes.clear()
        one = _ask(batcher, _rows(1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert model.sizes == []
        await asyncio.gather(one, *(_ask(batcher, _rows(n)) for n in range(3)))
        assert model.sizes == [4]

    _run(work, forward_s=10)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("bad", [0, 17, 69])
def test_request_that_the_model_fails_on_fails_alone(inline: bool, bad: int) -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        values = [-1 if n == bad else n for n in range(70)]
        tasks = [_ask(batcher, _rows(value)) for value in values]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for n, answer in enumerate(answers):
            if n == bad:
                assert isinstance(answer, ModelFailedError)
                assert str(answer) == (
                    "model 'doubler' failed on this input; the server's log says more"
                )
            else:
                np.testing.assert_array_equal(answer, [[2 * n]])  # pyright: ignore[reportArgumentType] -- not an exception

    _run(work, inline=inline, max_rows=70)


def test_cancelled_requests_leave_the_queue_and_harm_nobody() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        tasks = [_ask(batcher, _rows(n)) for n in range(8)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        assert batcher.waiting_rows == 4
        first.cancel()  # its forward runs already
        model.go_on.set()
        for n, task in list(enumerate(tasks))[1::2]:
            np.testing.assert_array_equal(await task, [[2 * n]])
        assert model.sizes == [4]

    _run(work)


def test_queue_whose_requests_were_all_cancelled_is_idle() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        tasks = [_ask(batcher, _rows(n)) for n in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert records.queued[-1] == 0
        model.go_on.set()
        await first
        await batcher.close(_now() + LONG_S)
        assert model.sizes == []

    _run(work)


def test_client_that_went_away_is_not_computed() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        gone = _ask(batcher, _rows(1), is_gone=lambda: True)
        stays = _ask(batcher, _rows(2), is_gone=lambda: False)
        await asyncio.sleep(0)
        model.go_on.set()
        await first
        with pytest.raises(ClientGoneError):
            await gone
        np.testing.assert_array_equal(await stays, [[4]])
        assert model.sizes == [1]

    _run(work)


def test_full_queue_refuses_and_says_when_to_come_again() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        tasks = [_ask(batcher, _rows(*[n] * 8)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="16 samples wait for 'doubler' already") as full:
            await _ask(batcher, _rows(1, 2, 3, 4, 5))
        assert full.value.retry_after_s == 6  # two batches of three seconds
        fits = _ask(batcher, _rows(1, 2, 3, 4))
        await asyncio.sleep(0)
        model.go_on.set()
        await asyncio.gather(first, *tasks, fits)

    _run(work, max_queue_rows=20, forward_s=3)


def test_those_who_went_away_make_room_in_a_full_queue() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        gone = _ask(batcher, _rows(*range(8)), is_gone=lambda: True)
        await asyncio.sleep(0)
        here = _ask(batcher, _rows(*range(8)))
        with pytest.raises(ClientGoneError):
            await gone
        model.go_on.set()
        await asyncio.gather(first, here)

    _run(work, max_queue_rows=8)


def test_deadline_ends_the_wait_in_the_queue_and_in_the_forward() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        model.go_on.clear()
        running = _ask(batcher, _rows(0), 0.05)
        while not model.started.is_set():
            await asyncio.sleep(0.001)
        waiting = _ask(batcher, _rows(1), 0.05)
        patient = _ask(batcher, _rows(2))
        for late in (running, waiting):
            with pytest.raises(OverloadedError, match=r"no answer from 'doubler' within 0\.0"):
                await late
        assert batcher.waiting_rows == 1
        model.go_on.set()
        np.testing.assert_array_equal(await patient, [[4]])

    _run(work)


def test_close_answers_what_was_asked_and_refuses_what_takes_too_long() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        first = await _held(batcher, model)
        second = _ask(batcher, _rows(1))
        await asyncio.sleep(0)
        await batcher.close(_now() + 0.05)
        for late in (first, second):
            with pytest.raises(OverloadedError):
                await late
        model.go_on.set()

    _run(work)


def test_random_traffic_with_cancellations_loses_nothing() -> None:
    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        random = np.random.default_rng(0)

        async def client(number: int) -> int:
            answered = 0
            for _ in range(30):
                values = random.integers(0, 100, random.integers(1, 9))
                values[values == 99] = -1
                task = _ask(batcher, _rows(*values))
                if random.random() < 0.3:
                    await asyncio.sleep(random.random() * 1e-3)
                    task.cancel()
                with suppress(asyncio.CancelledError, ModelFailedError):
                    np.testing.assert_array_equal(await task, _rows(*values) * 2)
                    answered += 1
            return answered

        assert sum(await asyncio.gather(*map(client, range(20)))) > 200

    _run(work)


def test_forward_times_are_interpolated_and_follow_what_is_seen() -> None:
    times = ForwardTimes({1: 1.0, 5: 3.0})
    assert times.of(3) == 2.0
    assert times.of(100) == 3.0
    for _ in range(100):
        times.saw(4, 6.0)
    assert times.of(5) == pytest.approx(6.0, rel=0.01)
    assert times.of(1) == 1.0


@pytest.mark.parametrize("inline", [True, False])
def test_requests_for_other_answers_share_no_batch(inline: bool) -> None:
    def negated(samples: Array) -> Array:
        if (samples == -1).any():
            raise ValueError("not this one")
        return -samples

    async def work(batcher: Batcher, model: Model, records: Records) -> None:
        deadline_s = _now() + LONG_S
        computes = [None, None, negated, negated, None]
        values = [1.0, 2.0, 3.0, -1.0, 5.0]
        answers = await asyncio.gather(
            *(
                batcher.predict(_rows(value), deadline_s, None, compute)
                for value, compute in zip(values, computes, strict=True)
            ),
            return_exceptions=True,
        )
        assert isinstance(answers.pop(3), ModelFailedError)
        assert [float(answer.item()) for answer in answers] == [2.0, 4.0, -3.0, 10.0]  # pyright: ignore[reportAttributeAccessIssue] -- no exceptions
        assert sum(rows for _, rows in records.batches) == 5
        assert max(rows for _, rows in records.batches) <= 2

    _run(work, inline=inline)
