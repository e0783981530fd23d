"""What the dispatcher asks of the files of jobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from syncbn.jobs.job import Job
from syncbn.train.run.directory import Result


@dataclass(frozen=True)
class Outcome:
    """What the files of a job say.

    Attributes:
        result: how the attempt ended; None if it has left no word.
        progress: the trainer's last word, and under "metrics" its last line of metrics; or None.
    """

    result: Result | None
    progress: dict[str, Any] | None


class Runs(Protocol):
    """What the dispatcher asks of the files of jobs."""

    def prepare(self, job: Job) -> None:
        """Write what an attempt needs, and that it is the one that may run.

        Raises:
            ConfigError, SubmissionError: the job cannot run as it was submitted, or is not offered
                any more.
            OSError: a file cannot be written.
        """
        ...

    def check(self, job: Job, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError if a job cannot go on with what a user asks for."""
        ...

    def revoke(self, job: Job) -> None:
        """Have no attempt run, should one be started late."""
        ...

    def is_free(self, job: Job) -> bool:
        """Return whether no process works for a job."""
        ...

    def outcome(self, job: Job) -> Outcome:
        """Return what the trainer said in the job's attempt, and not in one before it.

        An attempt for which `prepare` was not called has said nothing.
        """
        ...

    def publish(self, job: Job, model: str) -> dict[str, Any]:
        """Copy a finished job's model to those that are served; return its name and version.

        Raises:
            JobError: that cannot be done.
        """
        ...

    def published(self, job: Job) -> list[dict[str, Any]]:
        """Return where the trainer published the model of a job that has just finished."""
        ...

    def discard(self, job: Job) -> None:
        """Remove what takes space and is needed to go on with a job alone: its checkpoints."""
        ...
