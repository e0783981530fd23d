"""A world of jobs in memory: an engine that loses, delays and repeats calls, and kills anywhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from syncbn.errors import ConfigError, EngineError, JobError, SubmissionError
from syncbn.jobs.dispatch.dispatcher import Dispatcher
from syncbn.jobs.dispatch.runs import Outcome
from syncbn.jobs.dispatch.slots import Capacity, Sharing
from syncbn.jobs.engines.protocol import Attempt, Engine, Presence
from syncbn.jobs.job import Job
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from syncbn.train.run.directory import Result


class Killed(BaseException):
    """The dispatcher was killed: nothing of it catches this."""


@dataclass
class Clock:
    """Time that passes when it is told to."""

    wall: float = 1_700_000_000.0
    steady: float = 0.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def jump(self, seconds: float) -> None:
        """Have the time of day be set anew."""
        self.wall += seconds


@dataclass
class World:
    """What is outside the dispatcher: processes, files, and calls that are under way.

    Attributes:
        running: the attempt whose supervisor runs, by job.
        told: the attempts that were told to stop.
        starts: starts that the engine has accepted, and not carried out.
        permits: which attempt may run, by job.
        prepared: which attempt the files are of, by job.
        results: what attempts left, by job.
        killed_after: how many more calls there are before the dispatcher is killed; None: never.
        faults: what goes wrong with the next calls of the engine, by the name of the call.
        trained: how many times a supervisor began, by job and attempt.
    """

    running: dict[str, int] = field(default_factory=dict[str, int])
    told: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    starts: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    permits: dict[str, int] = field(default_factory=dict[str, int])
    prepared: dict[str, int] = field(default_factory=dict[str, int])
    results: dict[str, Result] = field(default_factory=dict[str, Result])
    progress: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    checkpoints: set[str] = field(default_factory=set[str])
    published: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    invalid: set[str] = field(default_factory=set[str])
    withdrawn: set[str] = field(default_factory=set[str])
    broken: set[str] = field(default_factory=set[str])
    killed_after: int | None = None
    faults: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    full: bool = False
    trained: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

    def point(self) -> None:
        """Be a place in which the dispatcher may be killed."""
        if self.killed_after is None:
            return
        if self.killed_after == 0:
            self.killed_after = None
            raise Killed
        self.killed_after -= 1

    def fault(self, call: str) -> str:
        """Return what goes wrong with a call of the engine; empty: nothing."""
        planned = self.faults.get(call)
        return planned.pop(0) if planned else ""

    def deliver(self, index: int) -> None:
        """Carry out a start, as late as this may be."""
        job, number = self.starts.pop(index)
        if self.running.get(job) == number:
            return  # the lock of the run keeps a repeated start out
        if self.permits.get(job) != number:
            return  # its time is over
        assert job not in self.running, f"two supervisors of {job}"
        self.running[job] = number
        self.trained[job, number] = self.trained.get((job, number), 0) + 1
        self.progress[job] = {"step": 0}

    def end(self, job: str, result: Result | None) -> None:
        """Have a supervisor end, and leave its word or none."""
        del self.running[job]
        if result is not None:
            self.results[job] = result

    def heed(self, job: str) -> None:
        """Have a supervisor that was told to stop do so."""
        if (job, self.running[job]) in self.told:
            self.end(job, Result("interrupted", "stopped", {}, 0, 143))


class WorldEngine:
    """An engine of the world."""

    name = "fake"

    def __init__(self, world: World, has_own_queue: bool) -> None:
        self._world = world
        self.has_own_queue = has_own_queue

    def start(self, attempt: Attempt) -> str:
        world, fault = self._world, self._world.fault("start")
        if fault == "lost":
            raise EngineError("the call was lost")
        world.starts.append((attempt.job, attempt.number))
        if fault == "repeated":
            world.starts.append((attempt.job, attempt.number))
        if fault == "late":  # carried out later, and not answered
            raise EngineError("no answer in time")
        if fault != "slow":
            world.deliver(len(world.starts) - 1)
        return attempt.name

    def observe(self, attempts: Sequence[Attempt]) -> dict[str, Presence]:
        world, fault = self._world, self._world.fault("observe")
        if fault in ("lost", "late"):
            return {}
        return {
            each.job: Presence.alive if each.job in world.running else Presence.gone
            for each in attempts
        }

    def explain(self, attempt: Attempt) -> str:
        return ""

    def stop(self, attempt: Attempt) -> None:
        if self._world.fault("stop") in ("lost", "late"):
            raise EngineError("the call was lost")
        self._world.told.add((attempt.job, self._world.running.get(attempt.job, -1)))

    def kill(self, attempt: Attempt) -> None:
        if self._world.fault("kill") in ("lost", "late"):
            raise EngineError("the call was lost")
        if attempt.job in self._world.running:
            self._world.end(attempt.job, None)

    def close(self) -> None:
        pass


class WorldRuns:
    """The files of the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def prepare(self, job: Job) -> None:
        if job.id in self._world.invalid:
            raise ConfigError("no such optimizer")
        if job.id in self._world.withdrawn:
            raise SubmissionError("data=ours: is not offered any more")
        if job.id in self._world.broken:
            raise RuntimeError("nobody thought of this")
        if self._world.full:
            raise OSError(28, "No space left on device")
        self._world.results.pop(job.id, None)
        self._world.progress.pop(job.id, None)
        self._world.permits[job.id] = self._world.prepared[job.id] = job.attempt

    def check(self, job: Job, arguments: Mapping[str, Any]) -> None:
        if job.id in self._world.broken:
            raise RuntimeError("nobody thought of this")
        if arguments.get("epochs", 99) < 2:
            raise ConfigError("that adds nothing")

    def revoke(self, job: Job) -> None:
        self._world.permits[job.id] = 0

    def is_free(self, job: Job) -> bool:
        return job.id not in self._world.running

    def outcome(self, job: Job) -> Outcome:
        if self._world.prepared.get(job.id) != job.attempt:
            return Outcome(None, None)
        return Outcome(self._world.results.get(job.id), self._world.progress.get(job.id))

    def publish(self, job: Job, model: str) -> dict[str, Any]:
        if self._world.full:
            raise JobError("the disk is full")
        if (job.id, model) not in self._world.published:
            self._world.published.append((job.id, model))
        return {"model": model, "version": 1 + self._world.published.index((job.id, model))}

    def published(self, job: Job) -> list[dict[str, Any]]:
        return []

    def discard(self, job: Job) -> None:
        pass


class Pointed:
    """Another object, before and after each of whose calls the dispatcher may be killed."""

    def __init__(self, inner: object, point: Callable[[], None]) -> None:
        self._inner = inner
        self._point = point

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            self._point()
            result = value(*arguments, **named)
            self._point()
            return result

        return call


def new_dispatcher(
    store: Store,
    world: World,
    clock: Clock,
    *,
    capacity: Capacity,
    sharing: Sharing | None = None,
    engine: Engine | None = None,
) -> Dispatcher:
    """Return a dispatcher as after a restart: it knows nothing but the store.

    Args:
        store: of its jobs.
        world: in which they run.
        clock: its time.
        capacity: what it gives to them.
        sharing: how.
        engine: that is as new; None: one of the world.
    """

    def attempt(job: Job) -> Attempt:
        return Attempt(
            job=job.id,
            number=job.attempt,
            directory=Workspace.of_job(store.database.directory, job.id).directory,
            cores=tuple(job.placement.get("cores", ())),
            gpus=tuple(job.placement.get("gpus", ())),
            cores_wanted=job.cores,
            gpus_wanted=job.gpus,
            nproc=job.spec.nproc,
            handle=job.handle,
            array=job.placement.get("array", ""),
            task=job.placement.get("task", 0),
        )

    ledger: Any = Pointed(Ledger(store, lambda: clock.wall), world.point)
    pointed: Any = Pointed(engine or WorldEngine(world, has_own_queue=False), world.point)
    runs: Any = Pointed(WorldRuns(world), world.point)
    return Dispatcher(
        ledger,
        pointed,
        runs,
        capacity,
        sharing or Sharing(),
        attempt=attempt,
        clock=lambda: clock.wall,
        monotonic=lambda: clock.steady,
    )
