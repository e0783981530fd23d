"""Asking the service: when a request is repeated, and what an answer comes to."""

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import msgspec

from syncbn.client.calls import Answer, Call
from syncbn.client.server import Server
from syncbn.client.steps import Ask, Failure, Pause, Program
from syncbn.errors import ServerError

T = TypeVar("T")

_BUSY = (429, 502, 503, 504)  # what a service says, or a proxy of it, that may answer later
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SAID_LETTERS = 2000  # of an answer that an error repeats


def ask(server: Server, call: Call[T], until_s: float | None = None) -> Program[T]:
    """Ask, and again where that can do no harm.

    A request that the service cannot have got is repeated; one that it may have got, or for which
    it is too busy, only if it is repeatable.

    Args:
        server: who is asked.
        call: the request.
        until_s: on the server's clock, when the answer must be there; None: its timeout_s counts
            alone.

    Raises:
        ServerError: there was no answer in time, or one that is no result.
    """
    deadline_s = server.clock() + server.timeout_s
    if until_s is not None:
        deadline_s = min(deadline_s, until_s)
    attempt = 0
    while True:
        outcome = yield Ask(call, max(deadline_s - server.clock(), 0.001))
        pause_s = _pause_before_repeating(call, outcome, attempt)
        if pause_s is None or attempt == server.retries:
            break
        if server.clock() + pause_s >= deadline_s:
            break
        yield Pause(pause_s)
        attempt += 1
    return result(server, call, outcome)


def ask_through_outages(server: Server, call: Call[T], until_s: float | None = None) -> Program[T]:
    """Ask, and wait for a service that cannot be reached, as while it is started anew.

    Args:
        server: who is asked.
        call: the request.
        until_s: on the server's clock; None: for its outage_s.

    Raises:
        ServerError: as `ask`; it could not be reached until then.
    """
    until_s = server.clock() + server.outage_s if until_s is None else until_s
    while True:
        try:
            return (yield from ask(server, call, until_s))
        except ServerError as error:
            may_pass = error.status is None or error.status in _BUSY
            left_s = until_s - server.clock()
            if not may_pass or left_s <= 0:
                raise
        yield Pause(min(_LONGEST_PAUSE_S, left_s))


def may_pass(outcome: Answer | Failure) -> bool:
    """Return whether the same request may succeed later."""
    return isinstance(outcome, Failure) or outcome.status in _BUSY


def backoff_s(attempt: int) -> float:
    """Return how long to wait before a repetition: twice as long each time, and not all at once.

    Args:
        attempt: how many were repeated before.
    """
    pause_s = min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_PAUSE_S)
    return pause_s * random.uniform(0.5, 1)  # noqa: S311 -- nothing that anybody might guess


def result(server: Server, call: Call[T], outcome: Answer | Failure) -> T:
    """Return what an answer holds.

    Raises:
        ServerError: it is an error, or nothing that a service of jobs says.
    """
    asked = f"{call.method} {call.path}"
    if isinstance(outcome, Failure):
        raise server.unreachable(
            outcome.reason, is_open=outcome.was_sent and not call.is_repeatable
        )
    if 300 <= outcome.status < 400:
        raise server.moved(outcome.status, outcome.headers.get("location", ""))
    if not 200 <= outcome.status < 300:
        _refuse(server, asked, outcome)
    try:
        return call.read(outcome)
    except (msgspec.MsgspecError, ValueError) as error:
        kind = outcome.headers.get("content-type", "no content type")
        raise server.misunderstood(outcome.status, asked, f"{kind}; {error}") from None


def _pause_before_repeating(
    call: Call[Any], outcome: Answer | Failure, attempt: int
) -> float | None:
    """Return how long to wait before a request is repeated; None: it is not."""
    if isinstance(outcome, Failure):
        return backoff_s(attempt) if call.is_repeatable or not outcome.was_sent else None
    if outcome.status not in _BUSY or not call.is_repeatable:
        return None
    wanted_s = _retry_after_s(outcome.headers)
    if wanted_s is not None:
        return wanted_s
    # A limit does not pass by itself, if the service does not say when.
    return None if outcome.status == HTTPStatus.TOO_MANY_REQUESTS else backoff_s(attempt)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    said = headers.get("retry-after", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0)


def _refuse(server: Server, asked: str, answer: Answer) -> NoReturn:
    """Raise what an answer that is an error says."""
    try:
        said = msgspec.json.decode(answer.content)
    except msgspec.MsgspecError:
        said = None
    if isinstance(said, dict) and isinstance(said.get("error"), str):
        text = " ".join("".join(c if c.isprintable() else " " for c in said["error"]).split())
        later_s = _retry_after_s(answer.headers)
        later = "" if later_s is None else f"; try again in {later_s:.0f} s"
        raise server.refused(answer.status, text[:_SAID_LETTERS] + later)
    if answer.status == HTTPStatus.NOT_FOUND and isinstance(said, dict):
        raise server.misunderstood(404, asked, "not found; was it started with --jobs")
    kind = answer.headers.get("content-type", "no content type")
    raise server.misunderstood(answer.status, asked, f"HTTP {answer.status}, {kind}")
