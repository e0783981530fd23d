"""The states of a job, which may follow which, and what a user may ask for in each."""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a job is.

    submitted: it is stored, and no dispatcher has looked at it. queued: it waits for cores and
    GPUs. starting: it has them, and its processes are being started. running: they train. stopping:
    they were told to write their state and end. paused: they have, and the job waits for a user.
    The other four are its ends: lost means that it ended without a word.
    """

    submitted = "submitted"
    queued = "queued"
    starting = "starting"
    running = "running"
    stopping = "stopping"
    paused = "paused"
    finished = "finished"
    failed = "failed"
    cancelled = "cancelled"
    lost = "lost"


class Action(StrEnum):
    """What a user may ask of a job that is there."""

    cancel = "cancel"
    pause = "pause"
    resume = "resume"
    retry = "retry"
    publish = "publish"
    archive = "archive"


_S = State
ENDED = frozenset({_S.finished, _S.failed, _S.cancelled, _S.lost})
# In which a job has cores and GPUs.
ACTIVE = frozenset({_S.starting, _S.running, _S.stopping})
WAITING = frozenset({_S.submitted, _S.queued})

ARROWS: Mapping[State, frozenset[State]] = {
    _S.submitted: frozenset({_S.queued, _S.paused, _S.failed, _S.cancelled}),
    _S.queued: frozenset({_S.starting, _S.paused, _S.failed, _S.cancelled}),
    # An attempt that never came to be goes back to the queue, as does one that is repeated.
    _S.starting: frozenset({_S.running, _S.stopping, _S.queued, _S.finished, _S.failed, _S.lost}),
    _S.running: frozenset({_S.stopping, _S.queued, _S.finished, _S.failed, _S.lost}),
    _S.stopping: frozenset({_S.paused, _S.cancelled, _S.finished, _S.failed, _S.lost}),
    _S.paused: frozenset({_S.queued, _S.cancelled}),
    _S.finished: frozenset({_S.queued}),
    _S.failed: frozenset({_S.queued}),
    _S.cancelled: frozenset({_S.queued}),
    _S.lost: frozenset({_S.queued}),
}

_ALLOWED: Mapping[Action, frozenset[State]] = {
    Action.cancel: WAITING | ACTIVE | {_S.paused},
    Action.pause: WAITING | {_S.starting, _S.running},
    Action.resume: frozenset({_S.paused, _S.cancelled, _S.finished}),
    Action.retry: frozenset({_S.failed, _S.lost, _S.cancelled}),
    Action.publish: frozenset({_S.finished}),
    Action.archive: ENDED,
}


def allowed_actions(state: State, *, is_archived: bool = False) -> tuple[Action, ...]:
    """Return what a user may ask of a job in a state.

    Args:
        state: of the job.
        is_archived: whether it was archived, after which nothing is left to go on with.
    """
    if is_archived:
        return ()
    return tuple(action for action, states in _ALLOWED.items() if state in states)


def states_for(action: Action) -> tuple[State, ...]:
    """Return the states in which a user may ask for an action."""
    return tuple(state for state in State if state in _ALLOWED[action])
