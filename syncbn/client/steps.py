"""The steps that a client takes, and what may come of them.

What a client does is written once, as programs: generators that yield steps and are sent their
outcomes. `JobsClient` takes the steps, `AsyncJobsClient` awaits them.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from syncbn.client.calls import Call

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """Send a request and read its whole answer; the outcome is an `Answer` or a `Failure`."""

    call: Call[Any]
    timeout_s: float


@dataclass(frozen=True)
class Connect:
    """Send a request for a stream of events.

    The outcome is None if it is one, else an `Answer` or a `Failure`.

    Attributes:
        call: the request.
        timeout_s: within which the stream must begin.
        silence_s: after which it is taken for dead.
    """

    call: Call[Any]
    timeout_s: float
    silence_s: float


@dataclass(frozen=True)
class Receive:
    """Take the next event of the stream; the outcome is a `Received` or a `Failure`."""


@dataclass(frozen=True)
class Pause:
    """Let time pass; the outcome is None."""

    duration_s: float


@dataclass(frozen=True)
class Give(Generic[T]):
    """Hand a value to whoever iterates; the outcome is None."""

    value: T


@dataclass(frozen=True)
class Received:
    """An event of a stream."""

    id: str
    kind: str
    data: str


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
        reason: in words.
        was_sent: whether the service may have got the request.
    """

    reason: str
    was_sent: bool = True


Step: TypeAlias = Ask | Connect | Receive | Pause
Program: TypeAlias = Generator[Step, Any, T]
Series: TypeAlias = Generator[Step | Give[T], Any, None]
