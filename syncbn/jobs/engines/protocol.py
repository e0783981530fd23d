"""What the dispatcher asks of whatever runs the jobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable


class Presence(StrEnum):
    """What an engine knows of an attempt.

    waiting: it has it, and has not started it. alive: processes of it are there. gone: it has
    none, because they ended, or because it never heard of it. dropped: it had it, gave it up before
    it began, and knows that. unknown: it could not be asked.
    """

    waiting = "waiting"
    alive = "alive"
    gone = "gone"
    dropped = "dropped"
    unknown = "unknown"


@dataclass(frozen=True)
class Attempt:
    """One try to run a job.

    Attributes:
        job: the job's identifier.
        number: of the attempt, from 1; job and number name it in the engine for good.
        directory: of the job: `syncbn.jobs.workspace.Workspace` says what is in it.
        cores: which cores of this machine it may use; none if the engine chooses them.
        gpus: which GPUs, likewise.
        cores_wanted: how many cores it takes.
        gpus_wanted: how many GPUs.
        nproc: how many ranks it has.
        handle: what `Engine.start` returned; empty if that is not known.
        array: what the array is called that it is handed over in; empty: it is by itself.
        task: its place in that, from 0.
    """

    job: str
    number: int
    directory: Path
    cores: tuple[int, ...]
    gpus: tuple[int, ...]
    cores_wanted: int
    gpus_wanted: int
    nproc: int
    handle: str = ""
    array: str = ""
    task: int = 0

    @property
    def name(self) -> str:
        """What an engine calls it."""
        return f"syncbn-{self.job}-{self.number}"


class Engine(Protocol):
    """Runs attempts, of which it keeps nothing that it could not find again after a restart.

    Each call has a deadline of its own. `start`, `stop` and `kill` may be repeated for the same
    attempt: what is done already is not done again.
    """

    @property
    def name(self) -> str:
        """What the command line calls it."""
        ...

    @property
    def has_own_queue(self) -> bool:
        """Whether it lets jobs wait by itself, so that the dispatcher need not count cores."""
        ...

    def start(self, attempt: Attempt) -> str:
        """Start an attempt and return by what the engine knows it.

        Raises:
            EngineError: it was not started, or nobody knows whether it was.
            ConfigError: it was not started, and never can be, as the engine has no such machines.
        """
        ...

    def observe(self, attempts: Sequence[Attempt]) -> dict[str, Presence]:
        """Return what is known of each attempt, by its job."""
        ...

    def explain(self, attempt: Attempt) -> str:
        """Return why an attempt waits, or why it is gone, as far as `observe` heard of it.

        A phrase that can follow a colon; empty if the engine does not say.
        """
        ...

    def stop(self, attempt: Attempt) -> None:
        """Tell an attempt to write its state and end; return at once.

        Raises:
            EngineError: it could not be told.
        """
        ...

    def kill(self, attempt: Attempt) -> None:
        """End an attempt without a state being written.

        Raises:
            EngineError: it could not be ended.
        """
        ...

    def close(self) -> None:
        """Let go of what this process holds; attempts go on."""
        ...


@runtime_checkable
class ArrayEngine(Engine, Protocol):
    """Starts attempts together that differ in nothing but their job, as those of a sweep."""

    def start_array(self, attempts: Sequence[Attempt]) -> dict[str, str]:
        """Start the tasks of one array, as `start` does; return what it does, by job.

        Args:
            attempts: of the same array, with the same needs; tasks may be missing among them.

        Raises:
            EngineError: none was started, or nobody knows whether they were.
            ConfigError: none was started, and none ever can be.
        """
        ...
