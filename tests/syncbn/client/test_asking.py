"""When a request is repeated, on a clock that the test moves."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from syncbn.client import calls, programs
from syncbn.client.asking import ask
from syncbn.client.calls import Answer
from syncbn.client.server import Server
from syncbn.client.steps import Ask, Connect, Failure, Pause, Receive
from syncbn.errors import JobTimeoutError, ServerError

JOB = Answer(200, {}, b'{"kind": "job", "id": "a", "name": "x", "state": "running"}')
REFUSED = Failure("connection refused", was_sent=False)
BROKEN = Failure("broken off")
READ, WRITE = calls.show("a"), calls.act("a", "cancel")


class Clock:
    """Time as a program passes it, and what it was."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []
        self.asked = 0

    def __call__(self) -> float:
        return self.now_s

    def run(self, program: Any, outcomes: Iterable[Any], asking_s: float = 0) -> Any:
        """Take a program's steps: each request has the next outcome, and takes some time."""
        left, outcome = iter(outcomes), None
        while True:
            try:
                step = program.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = None
            if isinstance(step, Pause):
                self.pauses_s.append(step.duration_s)
                self.now_s += step.duration_s
            elif isinstance(step, Ask | Connect | Receive):
                self.asked += 1
                self.now_s += asking_s
                outcome = next(left)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server("http://host", clock=clock)


def test_pauses_double_and_vary(clock: Clock, server: Server) -> None:
    assert clock.run(ask(server, READ), [REFUSED, BROKEN, Answer(502, {}, b""), JOB]).id == "a"
    for pause_s, most_s in zip(clock.pauses_s, (0.1, 0.2, 0.4), strict=True):
        assert most_s / 2 <= pause_s <= most_s


@pytest.mark.parametrize("outcome", [BROKEN, Answer(503, {"retry-after": "0"}, b"")])
def test_what_may_have_been_done_is_not_asked_again(
    clock: Clock, server: Server, outcome: Any
) -> None:
    with pytest.raises(ServerError):
        clock.run(ask(server, WRITE), [outcome])
    assert clock.asked == 1


def test_what_cannot_have_been_sent_is_asked_again(clock: Clock, server: Server) -> None:
    assert clock.run(ask(server, WRITE), [REFUSED, REFUSED, JOB]).id == "a"


def test_service_says_in_seconds_or_by_date_when_to_ask_again(clock: Clock, server: Server) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    waits = [Answer(503, {"retry-after": said}, b"") for said in ("7", date, past)]
    clock.run(ask(server, READ), [*waits, JOB])
    assert clock.pauses_s[0] == 7
    assert 15 < clock.pauses_s[1] <= 20
    assert clock.pauses_s[2] == 0


def test_header_that_says_nothing_is_passed_over(clock: Clock, server: Server) -> None:
    clock.run(ask(server, READ), [Answer(503, {"retry-after": "soon"}, b""), JOB])
    assert clock.pauses_s[0] <= 0.1


def test_nothing_is_repeated_beyond_the_deadline(clock: Clock, server: Server) -> None:
    with pytest.raises(ServerError, match="broken off"):
        clock.run(ask(server, READ), [BROKEN] * 9, asking_s=11)
    assert clock.asked == 3
    with pytest.raises(ServerError):
        clock.run(ask(server, READ), [Answer(503, {"retry-after": "31"}, b"")])


def test_waiting_sits_out_that_the_service_is_started_anew(clock: Clock, server: Server) -> None:
    done = Answer(200, {}, JOB.content.replace(b"running", b"finished"))
    outcomes = [JOB, *[REFUSED] * 100, done]
    assert clock.run(programs.wait(server, "a", timeout_s=1000), outcomes).state == "finished"
    assert max(clock.pauses_s) == 5


def test_waiting_ends_with_its_time_while_the_service_is_away(clock: Clock, server: Server) -> None:
    with pytest.raises(JobTimeoutError, match=r"is running, .* known last: .* refused"):
        clock.run(programs.wait(server, "a", timeout_s=100), [JOB, *[REFUSED] * 1000])
    assert clock.now_s == pytest.approx(100, abs=1)


def test_waiting_for_a_service_that_never_answered_is_not_long(
    clock: Clock, server: Server
) -> None:
    with pytest.raises(ServerError):
        clock.run(programs.wait(server, "a", timeout_s=100), [REFUSED] * 4)
    assert clock.now_s < 1


def test_watching_gives_up_after_a_minute_without_the_service(clock: Clock, server: Server) -> None:
    with pytest.raises(ServerError, match="connection refused"):
        clock.run(programs.watch(server, "a"), [JOB, *[REFUSED] * 1000])
    assert clock.now_s == pytest.approx(60, abs=2)


def test_what_the_service_refuses_ends_the_waiting_at_once(clock: Clock, server: Server) -> None:
    gone = Answer(404, {}, b'{"error": "there is no job a"}')
    with pytest.raises(ServerError, match="there is no job a"):
        clock.run(programs.wait(server, "a", timeout_s=100), [JOB, gone])


def test_events_are_not_asked_for_longer_than_an_outage_may_last(
    clock: Clock, server: Server
) -> None:
    with pytest.raises(ServerError, match="connection refused"):
        clock.run(programs.follow_events(server, None, ""), [None, BROKEN, *[REFUSED] * 1000])
    assert clock.now_s == pytest.approx(60, abs=6)


def test_events_of_a_service_that_never_answered_are_not_asked_for_long(
    clock: Clock, server: Server
) -> None:
    with pytest.raises(ServerError, match="connection refused"):
        clock.run(programs.follow_events(server, None, ""), [REFUSED] * 4)
    assert clock.now_s < 1


def test_connections_that_break_at_once_are_made_ever_more_slowly(
    clock: Clock, server: Server
) -> None:
    refused = Answer(404, {}, b'{"error": "enough"}')
    outcomes = [None, BROKEN] * 20 + [refused]
    with pytest.raises(ServerError, match="enough"):
        clock.run(programs.follow_events(server, None, ""), outcomes)
    assert clock.pauses_s[0] <= 0.1
    assert min(clock.pauses_s[10:]) >= 2.5
