"""Brings jobs from state to state: what users ask for, what engines see, what has room."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from syncbn.errors import (
    ConfigError,
    EngineError,
    JobError,
    JobStoreError,
    SubmissionError,
    SyncBNError,
)
from syncbn.jobs.dispatch.runs import Runs
from syncbn.jobs.dispatch.slots import Capacity, Free, Sharing, free_of, rank
from syncbn.jobs.engines.protocol import ArrayEngine, Attempt, Engine, Presence
from syncbn.jobs.job import Job, Request
from syncbn.jobs.states import ACTIVE, ENDED, Action, State, allowed_actions
from syncbn.jobs.store.ledger import Ledger
from syncbn.train.run.directory import Result
from syncbn.train.run.reasons import CONFIG, INTERNAL, RETRIED

log = logging.getLogger(__name__)

# A job, with the cores and GPUs that it gets.
_Placed = tuple[Job, Mapping[str, Any]]

# How many jobs of the queue are looked at in one step.
_LOOK_AHEAD = 200
# How many are let into it, so that a large sweep keeps nobody waiting.
_ADMITTED = 500
# How long a job that could not be started lets others go first.
_BACKOFF_S = 5.0
# A rank has 30 s to write its state, after which the supervisor ends it.
_STOP_S = 60.0
_KILL_AGAIN_S = 2.0
# Files that another machine has written may take so long to be seen here.
_APPEAR_S = 5.0
# A rank says each second that it lives, and the watchdog ends one that hangs, in minutes.
_SILENCE_S = 900.0
_PROGRESS_S = 1.0


@dataclass
class _Memory:
    """What is remembered of jobs between steps, and may be lost with the process.

    Times are those of a clock that does not jump.
    """

    not_before: dict[str, float] = field(default_factory=dict[str, float])
    gone_at: dict[str, float] = field(default_factory=dict[str, float])
    kill_at: dict[str, float] = field(default_factory=dict[str, float])
    killed_at: dict[str, float] = field(default_factory=dict[str, float])
    heard: dict[str, tuple[Any, float]] = field(default_factory=dict[str, tuple[Any, float]])
    progress_at: float = 0.0
    no_starts_before: float = 0.0

    def forget(self, job: str) -> None:
        for each in (self.not_before, self.gone_at, self.kill_at, self.killed_at, self.heard):
            each.pop(job, None)


class Dispatcher:
    """Starts jobs, watches them and writes their states.

    Whatever it is about to do is in the store before it is done, so that one that is started after
    a kill finds what was meant, asks the engine what is, and goes on from there. There must be one
    for a store.

    Args:
        ledger: writes states.
        engine: runs attempts.
        runs: has the files.
        capacity: what it gives to jobs.
        sharing: how it is shared.
        clock: returns the time in Unix seconds.
        monotonic: returns seconds that never jump.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: Engine,
        runs: Runs,
        capacity: Capacity,
        sharing: Sharing,
        *,
        attempt: Callable[[Job], Attempt],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._engine = engine
        self._runs = runs
        self._capacity = capacity
        self._sharing = sharing
        self._attempt = attempt
        self._clock = clock
        self._monotonic = monotonic
        self._memory = _Memory()

    def step(self) -> bool:
        """Look at everything once, and do what there is to do.

        Returns:
            Whether there is more, for which nothing need be waited for.

        Raises:
            JobStoreError: the store cannot be read or written; the next step goes on from there.
        """
        for request in self._ledger.requests():
            try:
                self._do(request)
            except OSError:  # of the store, or a disk: it is tried again
                raise
            except Exception as error:  # or it would keep all else from being done, for ever
                log.exception("job %s", request.job)
                text = f"{request.action} failed: {type(error).__name__}: {error}"
                self._ledger.done(request, "note", {"text": text}, wanted=None)
        self._observe()
        submitted = self._ledger.jobs([State.submitted], _ADMITTED)
        if submitted:
            with self._ledger.together():
                for job in submitted:
                    self._admit(job)
        return self._start() or len(submitted) == _ADMITTED

    def free(self) -> Free:
        """Return what no job has."""
        return free_of(self._capacity, self._ledger.jobs(sorted(ACTIVE)))

    def _do(self, request: Request) -> None:
        job = self._ledger.get(request.job)
        action = Action(request.action)
        if job is None or action not in allowed_actions(job.state, is_archived=job.archived):
            # It has moved on since.
            state = "not there" if job is None else job.state
            settled = {} if job is None or job.state in ACTIVE else {"wanted": None}
            text = f"{action}: the job is {state} already"
            self._ledger.done(request, "note", {"text": text}, **settled)
            return
        if action in (Action.cancel, Action.pause):
            self._end_or_pause(job, request, action)
        elif action in (Action.resume, Action.retry):
            self._go_on(job, request)
        elif action == Action.publish:
            self._publish(job, request)
        else:
            self._runs.discard(job)
            self._ledger.done(request, "note", {"text": "archived"}, archived=True)

    def _end_or_pause(self, job: Job, request: Request, action: Action) -> None:
        wanted = State.cancelled if action == Action.cancel else State.paused
        if job.state in ACTIVE:
            text = f"{action} is under way"
            self._ledger.done(request, "note", {"text": text}, wanted=wanted)
            return  # which `_observe` sees to
        ended = {"ended": self._clock()} if wanted == State.cancelled else {}
        self._ledger.move(
            job, wanted, "asked", f"{wanted} by {request.by}", request=request, wanted=None, **ended
        )

    def _go_on(self, job: Job, request: Request) -> None:
        arguments = {**job.arguments, **request.arguments}
        if job.attempt and (request.arguments or job.state == State.finished):
            try:
                self._runs.check(job, request.arguments)
            except (SyncBNError, OSError) as error:
                text = f"{request.action} was refused: {error}"
                self._ledger.done(request, "note", {"text": text}, wanted=None)
                return
        self._ledger.move(
            job,
            State.queued,
            "asked",
            f"{request.action} by {request.by}",
            request=request,
            arguments=arguments,
            failures=0,
            wanted=None,
            ended=None,
            objective=None,
            **self._line(job),
        )

    def _publish(self, job: Job, request: Request) -> None:
        model = str(request.arguments.get("model") or job.spec.publish or job.name)
        try:
            where = self._runs.publish(job, model)
        except JobError as error:
            self._ledger.done(request, "note", {"text": str(error)})
            return
        published = [*(each for each in job.published if each != where), where]
        self._ledger.done(request, "published", where, published=published)

    def _line(self, job: Job) -> dict[str, Any]:
        """Return the columns of a job that gets in line now."""
        now = self._clock()
        return {"queued": now, "rank": rank(now, job.spec.priority, self._sharing.aging_s)}

    def _admit(self, job: Job) -> None:
        """Let a submitted job into the queue, unless it could never leave it."""
        nproc = job.spec.nproc
        device = job.device
        if device == "auto":
            device = "cuda" if len(self._capacity.gpus) >= nproc else "cpu"
        gpus = nproc if device == "cuda" else 0
        most_cores, most_gpus = self._most()
        lacks = [
            f"{wanted} {what}, of which the dispatcher has {most}"
            for wanted, most, what in (
                (job.cores, most_cores, "cores"),
                (gpus, most_gpus, "GPUs"),
            )
            if most is not None and wanted > most
        ]
        if lacks:
            self._ledger.move(
                job,
                State.failed,
                "too_large",
                f"it needs {' and '.join(lacks)}: submit it with fewer",
                ended=self._clock(),
            )
            return
        self._ledger.move(job, State.queued, None, "", device=device, gpus=gpus, **self._line(job))

    def _most(self) -> tuple[int | None, int | None]:
        """Return how many cores and GPUs a job may need at all; None: any number."""
        if self._engine.has_own_queue:
            return len(self._capacity.cores) or None, None
        return len(self._capacity.cores), len(self._capacity.gpus)

    def _start(self) -> bool:
        """Start jobs from the head of the queue, as far as there is room; return whether any."""
        free = self.free()
        if not free.cores and not self._engine.has_own_queue:
            return False
        limit = self._sharing.cores_per_owner
        cores_of = {} if limit is None else self._ledger.cores_by_owner()
        most_cores, most_gpus = self._most()
        waiting = self._ledger.queue(
            _LOOK_AHEAD, cores_of, limit, most_cores=most_cores, most_gpus=most_gpus
        )
        now = self._monotonic()
        chosen: list[_Placed] = []
        for job in waiting:
            if job.wanted is not None or self._memory.not_before.get(job.id, 0) > now:
                continue
            if limit is not None and cores_of.get(job.owner, 0) + job.cores > limit:
                continue
            placement = self._place(job, free)
            if placement is None:
                # Smaller jobs may go first for a while, and not for ever.
                if self._clock() - (job.queued or 0) > self._sharing.patience_s:
                    break
                continue
            chosen.append((job, placement))
            cores_of[job.owner] = cores_of.get(job.owner, 0) + job.cores
            free = free.without(placement)
        started = False
        for together in self._grouped(chosen):
            if self._memory.no_starts_before > self._monotonic():
                break
            self._begin(together)
            started = True
        return started

    def _grouped(self, chosen: Sequence[_Placed]) -> Iterator[Sequence[_Placed]]:
        """Give what is started by one call each, in the order of the queue."""
        takes_arrays = isinstance(self._engine, ArrayEngine)

        def kind(placed: _Placed) -> tuple[Any, ...]:
            job, _ = placed
            alone = job.sweep is None or not takes_arrays
            return (job.id,) if alone else (job.sweep, job.cores, job.gpus, job.spec.nproc)

        return (list(together) for _, together in itertools.groupby(chosen, kind))

    def _place(self, job: Job, free: Free) -> dict[str, list[int]] | None:
        """Return cores and GPUs for a job, or None if it has to wait for them."""
        if not self._engine.has_own_queue:
            return free.place(job.cores, job.gpus)
        return free.place(job.cores, 0) if self._capacity.cores else {"cores": [], "gpus": []}

    def _begin(self, together: Sequence[_Placed]) -> None:
        """Start an attempt at each of some jobs, by one call of the engine."""
        first, _ = together[0]
        array = f"syncbn-{first.id}-{first.attempt + 1}-array" if len(together) > 1 else ""
        jobs: list[Job] = []
        with self._ledger.together():
            for task, (job, placement) in enumerate(together):
                place = {**placement, "array": array, "task": task} if array else placement
                begun = self._ledger.move(
                    job,
                    State.starting,
                    None,
                    "its processes are being started",
                    attempt=job.attempt + 1,
                    placement=place,
                    handle="",
                    started=self._clock(),
                )
                self._memory.forget(job.id)
                jobs.append(begun)
        ready = [job for job in jobs if self._succeeds([job], partial(self._runs.prepare, job))]
        if ready:
            self._succeeds(ready, partial(self._hand_over, ready))

    def _hand_over(self, jobs: Sequence[Job]) -> None:
        """Have the engine start attempts for which everything is prepared."""
        attempts = [self._attempt(job) for job in jobs]
        if attempts[0].array:
            assert isinstance(self._engine, ArrayEngine)
            handles = self._engine.start_array(attempts)
        else:
            handles = {attempts[0].job: self._engine.start(attempts[0])}
        with self._ledger.together():
            for job in jobs:
                self._ledger.note_handle(job, handles[job.id])

    def _succeeds(self, jobs: Sequence[Job], start: Callable[[], None]) -> bool:
        """Do something towards starting jobs, and say of each if that fails; return whether not."""
        try:
            start()
        except JobStoreError:
            raise
        except (ConfigError, SubmissionError) as error:
            self._give_up(jobs, CONFIG, str(error))
        except (EngineError, OSError) as error:
            # Nobody knows whether they were started: `_observe` will.
            log.warning("job %s: %s", ", ".join(job.id for job in jobs), error)
            self._ledger.note_reasons({job.id: ("start_failed", str(error)) for job in jobs})
            if self._engine.has_own_queue:
                # The next job would fare no better.
                self._memory.no_starts_before = self._monotonic() + _BACKOFF_S
        except Exception as error:  # or it would keep all others from starting, for ever
            log.exception("job %s", ", ".join(job.id for job in jobs))
            self._give_up(jobs, INTERNAL, f"{type(error).__name__}: {error}")
        else:
            return True
        return False

    def _give_up(self, jobs: Sequence[Job], code: str, reason: str) -> None:
        """Fail jobs of which no attempt was started."""
        for job in jobs:
            self._ledger.move(job, State.failed, code, reason, placement={}, ended=self._clock())

    def _observe(self) -> None:
        """Ask the engine about all attempts, and bring their jobs to where they are."""
        active = self._ledger.jobs(sorted(ACTIVE))
        if not active:
            return
        attempts = {job.id: self._attempt(job) for job in active}
        seen = self._engine.observe(list(attempts.values()))
        progress: dict[str, Mapping[str, Any]] = {}
        for job in active:
            presence = seen.get(job.id, Presence.unknown)
            try:
                if presence in (Presence.gone, Presence.dropped):
                    self._conclude(job, attempts[job.id], presence)
                elif presence != Presence.unknown:
                    said = self._attend(job, attempts[job.id], presence)
                    if said is not None and said != job.progress:
                        progress[job.id] = said
            except EngineError as error:
                log.warning("job %s: %s", job.id, error)
            except OSError as error:
                if isinstance(error, JobError):
                    raise
                log.warning("job %s: %s", job.id, error)
        now = self._monotonic()
        if progress and now - self._memory.progress_at >= _PROGRESS_S:
            self._memory.progress_at = now
            self._ledger.note_progress(progress)

    def _attend(self, job: Job, attempt: Attempt, presence: Presence) -> dict[str, Any] | None:
        """See to an attempt that the engine has; return what its trainer said."""
        if job.wanted is not None and job.state != State.stopping:
            verb = "cancelled" if job.wanted == State.cancelled else "paused"
            job = self._ledger.move(
                job, State.stopping, "asked", f"it writes its state, and is {verb} then"
            )
        if job.state == State.stopping:
            self._stop(job, attempt)
            if presence == Presence.waiting:
                self._withdraw(job)
            return None
        if presence == Presence.waiting:
            self._memory.heard.pop(job.id, None)
            why = self._engine.explain(attempt)
            reason = f"it waits in the queue of {self._engine.name}{why and f': {why}'}"
            if (job.reason_code, job.reason) != ("engine_queue", reason):
                self._ledger.note_reasons({job.id: ("engine_queue", reason)})
            return None
        if job.state == State.starting:
            job = self._ledger.move(job, State.running, None, "")
        elif job.reason_code == "engine_queue":  # into which the engine had put it again
            self._ledger.note_reasons({job.id: (None, "")})
        progress = self._runs.outcome(job).progress
        self._tell_restarts(job, progress)
        last, heard = self._memory.heard.get(job.id, (None, self._monotonic()))
        if progress != last or job.id not in self._memory.heard:
            self._memory.heard[job.id] = progress, self._monotonic()
        elif self._monotonic() - heard > _SILENCE_S:
            log.warning("job %s has been silent for %d s, and is killed", job.id, _SILENCE_S)
            self._kill(job, attempt)
        return progress

    def _tell_restarts(self, job: Job, progress: Mapping[str, Any] | None) -> None:
        """Write into a job's history that its replicas were started again in place."""
        count, before = _restarts(progress), job.progress
        if progress is None or before is None or before.get("started") != progress.get("started"):
            before = None  # of an earlier attempt
        if count > _restarts(before):
            limit = job.spec.retries - job.failures
            text = (
                "a replica failed, and all went on from the newest checkpoint "
                f"({count} of {limit} times in attempt {job.attempt}); the log says why"
            )
            with self._ledger.together():
                self._ledger.note(job, text)
                self._ledger.note_progress({job.id: progress or {}})

    def _stop(self, job: Job, attempt: Attempt) -> None:
        """Tell an attempt to stop; once its time is over, kill it."""
        now = self._monotonic()
        deadline = self._memory.kill_at.get(job.id)
        if deadline is None:
            self._engine.stop(attempt)
            self._memory.kill_at[job.id] = now + _STOP_S
        elif now > deadline:
            self._kill(job, attempt)

    def _kill(self, job: Job, attempt: Attempt) -> None:
        """Kill an attempt, and again only after a while, as this is work for a cluster."""
        now = self._monotonic()
        if self._memory.killed_at.get(job.id, -math.inf) + _KILL_AGAIN_S <= now:
            self._engine.kill(attempt)
            self._memory.killed_at[job.id] = now

    def _withdraw(self, job: Job) -> None:
        """Settle a job that shall stop and has not begun: the engine may let it wait for long."""
        self._runs.revoke(job)
        if self._runs.is_free(job):
            self._memory.forget(job.id)
            self._settle(job, f"it was in the queue of {self._engine.name}")

    def _conclude(self, job: Job, attempt: Attempt, presence: Presence) -> None:
        """Bring a job whose attempt is gone to where it belongs."""
        # From now on, one that the engine starts late finds that it may not run.
        self._runs.revoke(job)
        if not self._runs.is_free(job):
            # Ranks without a supervisor; or one that began just now, and may go on.
            self._kill(job, attempt)
            return
        outcome = self._runs.outcome(job)
        if outcome.result is None and self._engine.has_own_queue:
            now = self._monotonic()
            if now - self._memory.gone_at.setdefault(job.id, now) < _APPEAR_S:
                return
        self._memory.forget(job.id)
        why = self._engine.explain(attempt)
        if outcome.progress is not None:
            self._tell_restarts(job, outcome.progress)
            self._ledger.note_progress({job.id: outcome.progress})
        failures = job.failures + _restarts(outcome.progress)
        is_begun = job.state != State.starting or outcome.result is not None
        if not is_begun and (not job.handle or presence == Presence.dropped):
            self._memory.not_before[job.id] = self._monotonic() + _BACKOFF_S
            failed = job.reason if job.reason_code == "start_failed" else "it was never started"
            self._again(job, "not_started", f"{why or failed}; it is tried again", failures)
        elif outcome.result is None:
            self._lose(job, why, failures)
        else:
            self._end(job, outcome.result, failures)

    def _end(self, job: Job, result: Result, failures: int) -> None:
        if result.status == "finished":
            self._ledger.move(
                job,
                State.finished,
                "finished",
                result.error or "",
                wanted=None,
                placement={},
                objective=result.objective,
                published=self._published(job),
                failures=0,
                ended=self._clock(),
            )
        elif job.state == State.stopping:
            self._settle(job, result.error or "it wrote its state")
        elif result.status == "interrupted":
            self._again(
                job,
                "interrupted",
                "it was told to stop from outside, and goes on from its state",
                failures,
            )
        else:
            self._fail(job, State.failed, result.reason, result.error or "it failed", failures)

    def _lose(self, job: Job, why: str, failures: int) -> None:
        if job.state == State.stopping:
            self._settle(job, "it was killed before it had written its state")
        else:
            text = f"it ended without a word: {why or 'killed, most likely'}"
            self._fail(job, State.lost, "killed", text, failures)

    def _settle(self, job: Job, reason: str) -> None:
        """Bring a job that was told to stop to where its user wants it."""
        wanted = job.wanted or State.cancelled
        ended: dict[str, Any] = {"ended": self._clock()} if wanted in ENDED else {}
        self._ledger.move(job, wanted, "asked", reason, wanted=None, placement={}, **ended)

    def _fail(self, job: Job, end: State, code: str, reason: str, failures: int) -> None:
        """Repeat an attempt that did not go well, if that may help and is allowed."""
        left = job.spec.retries - failures
        if code in RETRIED and left > 0:
            text = f"attempt {job.attempt}: {reason}; it is tried again, and {left - 1} times more"
            self._again(job, code, text, failures + 1)
            return
        self._ledger.move(job, end, code, reason, wanted=None, placement={}, ended=self._clock())

    def _again(self, job: Job, code: str, reason: str, failures: int) -> None:
        if job.wanted is not None:  # asked for meanwhile
            job = self._ledger.move(job, State.stopping, "asked", reason)
            self._settle(job, reason)
            return
        self._ledger.move(
            job,
            State.queued,
            code,
            reason,
            placement={},
            handle="",
            failures=failures,
            **self._line_again(job),
        )

    def _line_again(self, job: Job) -> dict[str, Any]:
        """Return the columns of a job that gets its old place in line back."""
        queued = job.queued or self._clock()
        return {"rank": rank(queued, job.spec.priority, self._sharing.aging_s)}

    def _published(self, job: Job) -> list[dict[str, Any]]:
        found = self._runs.published(job)
        return [*job.published, *(each for each in found if each not in job.published)]


def _restarts(progress: Mapping[str, Any] | None) -> int:
    """Return how often an attempt's replicas were started again, by what its trainer said."""
    return 0 if progress is None else int(progress.get("restarts") or 0)
