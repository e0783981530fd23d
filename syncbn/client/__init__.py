"""The service of training jobs, asked from Python: `JobsClient` and, for asyncio, its twin."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.client.asynchronous import AsyncJobsClient
    from syncbn.client.blocking import JobsClient
    from syncbn.client.calls import Selection, Submission
    from syncbn.client.results import (
        Attempt,
        Comparison,
        Event,
        Job,
        LogEvent,
        MetricsEvent,
        Options,
        Page,
        Progress,
        ProgressEvent,
        StateEvent,
        Sweep,
        Transition,
    )

__all__ = [
    "AsyncJobsClient",
    "Attempt",
    "Comparison",
    "Event",
    "Job",
    "JobsClient",
    "LogEvent",
    "MetricsEvent",
    "Options",
    "Page",
    "Progress",
    "ProgressEvent",
    "Selection",
    "StateEvent",
    "Submission",
    "Sweep",
    "Transition",
]

# Loaded when first asked for, so that the command answers --help without HTTP and asyncio.
_HOMES = {
    "AsyncJobsClient": "asynchronous",
    "JobsClient": "blocking",
    "Selection": "calls",
    "Submission": "calls",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'results')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
