"""The jobs that there are, as those who submit and watch them see it."""

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from syncbn.errors import JobActionError, JobLimitError, JobNotFoundError, SubmissionError
from syncbn.jobs.job import DispatcherInfo, Event, Job, Page, Sweep
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import WAITING, Action, State, allowed_actions, states_for
from syncbn.jobs.store.database import Database
from syncbn.jobs.store.grouping import GroupedWrites
from syncbn.jobs.store.rows import event_of, job_of

# Without those that are easily mistaken for each other.
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
_ID_LETTERS = 10
# For how long a repeated submission is recognized.
_IDEMPOTENCY_S = 86_400.0
MAX_PAGE = 500
# So that nobody takes the state that a job is about to leave for one that it has come to.
_WANTED = {
    Action.cancel: State.cancelled,
    Action.pause: State.paused,
    Action.resume: State.queued,
    Action.retry: State.queued,
}


class Store:
    """The jobs in a directory.

    It may be used from any thread and any number of processes. What is answered is on the disk.
    It never communicates but with the file system.

    Args:
        directory: of the store, which is made if it is not there.
        clock: returns the time in Unix seconds.

    Raises:
        JobStoreError: the store cannot be made or opened; every method raises it too, if the file
            cannot be read or written.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(directory)
        self._writes = GroupedWrites(self.database)
        self._clock = clock

    @property
    def directory(self) -> Path:
        """Where the store is."""
        return self.database.directory

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def submit(
        self,
        specs: Sequence[JobSpec],
        *,
        owner: str,
        sweep_name: str | None = None,
        idempotency_key: str | None = None,
        max_waiting: int | None = None,
        max_disk_bytes: int | None = None,
    ) -> list[Job]:
        """Store jobs, all or none, and return them.

        Args:
            specs: what `Catalog.check` returned.
            owner: who submits them.
            sweep_name: what they are called together; None: they are no sweep.
            idempotency_key: the same key with the same jobs again within a day returns those that
                are there.
            max_waiting: how many jobs of an owner may wait; None: any number.
            max_disk_bytes: how much the files of an owner's jobs may have; None: all there is.

        Raises:
            SubmissionError: the key was used for other jobs.
            JobLimitError: too many jobs of this owner wait, or their files are too large.
        """
        now = self._clock()
        digest = _digest(specs, sweep_name)

        def store(connection: sqlite3.Connection) -> list[Job]:
            if idempotency_key is not None:
                known = _submitted(connection, owner, idempotency_key, digest, now)
                if known is not None:
                    return self._waiting([_get(connection, job) for job in known], connection)
            if max_waiting is not None:
                _check_waiting(connection, owner, len(specs), max_waiting)
            if max_disk_bytes is not None:
                _check_disk(connection, owner, max_disk_bytes)
            sweep = None
            if sweep_name is not None:
                sweep = _new_id()
                connection.execute(
                    "INSERT INTO sweeps VALUES (?, ?, ?, ?)", (sweep, sweep_name, owner, now)
                )
            jobs = [_insert(connection, spec, owner, sweep, now) for spec in specs]
            if idempotency_key is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO submissions VALUES (?, ?, ?, ?, ?)",
                    (owner, idempotency_key, digest, json.dumps(jobs), now),
                )
            return self._waiting([_get(connection, job) for job in jobs], connection)

        return self._writes.write(store)

    def get(self, job: str) -> Job:
        """Return a job.

        Raises:
            JobNotFoundError: there is none of that identifier.
        """
        with self.database.reading() as connection:
            return self._waiting([_get(connection, job)], connection)[0]

    def sweep(self, sweep: str) -> Sweep:
        """Return a sweep.

        Raises:
            JobNotFoundError: there is none of that identifier.
        """
        with self.database.reading() as connection:
            row = connection.execute("SELECT * FROM sweeps WHERE id = ?", (sweep,)).fetchone()
        if row is None:
            raise JobNotFoundError(f"there is no sweep {sweep[:40]!r}")
        return Sweep(row["id"], row["name"], row["owner"], row["submitted"])

    def select(
        self,
        *,
        states: Sequence[State] = (),
        name: str | None = None,
        sweep: str | None = None,
        text: str | None = None,
        owner: str | None = None,
        archived: bool = False,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page:
        """Return jobs, newest first.

        Args:
            states: of these; none: of all.
            name: called exactly this.
            sweep: of this sweep.
            text: with this in the identifier, the name, the owner or what was submitted.
            owner: of this one.
            archived: those that were put away instead of the others.
            cursor: what the page before named as the next one.
            limit: at most so many on a page, up to 500.

        Raises:
            SubmissionError: the cursor is none.
        """
        conditions, values = ["archived = ?"], list[Any]([archived])
        if states:
            conditions.append(f"state IN ({', '.join('?' * len(states))})")
            values += [str(state) for state in states]
        for column, value in (("name", name), ("sweep", sweep), ("owner", owner)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if text:
            conditions.append(
                "(id LIKE ? ESCAPE '\\' OR name LIKE ? ESCAPE '\\' OR owner LIKE ? ESCAPE '\\' "
                "OR spec LIKE ? ESCAPE '\\')"
            )
            escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            values += [f"%{escaped}%"] * 4
        where = " AND ".join(conditions)
        limit = max(1, min(limit, MAX_PAGE))
        with self.database.reading() as connection:
            total = connection.execute(
                f"SELECT COUNT(*) FROM jobs WHERE {where}",  # noqa: S608 -- our own text
                values,
            ).fetchone()[0]
            if cursor is not None:
                where += " AND number < ?"
                values.append(_number(cursor))
            rows = connection.execute(
                f"SELECT * FROM jobs WHERE {where} ORDER BY number DESC LIMIT ?",  # noqa: S608 -- ditto
                [*values, limit + 1],
            ).fetchall()
            jobs = self._waiting([job_of(row) for row in rows[:limit]], connection)
        return Page(jobs, str(jobs[-1].number) if len(rows) > limit else None, total)

    def counts(self, *, archived: bool = False) -> dict[str, int]:
        """Return how many jobs there are in each state that has any."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT state, COUNT(*) FROM jobs WHERE archived = ? GROUP BY state", (archived,)
            )
            return {row[0]: row[1] for row in rows}

    def request(
        self,
        job: str,
        action: Action,
        *,
        by: str,
        arguments: Mapping[str, Any] | None = None,
        max_waiting: int | None = None,
        max_disk_bytes: int | None = None,
    ) -> Job:
        """Ask for something to be done with a job, and return the job as it is now.

        The dispatcher does it, as soon as there is one. What was asked for already is not asked
        for again.

        Args:
            job: its identifier.
            action: what is asked for.
            by: who asks.
            arguments: what else is said of it.
            max_waiting: how many jobs of the job's owner may wait; None: any number.
            max_disk_bytes: how much the files of the owner's jobs may have; None: all there is.

        Raises:
            JobNotFoundError: there is no such job.
            JobActionError: the job's state does not allow it.
            JobLimitError: the job would wait again, and too many do, or its owner's jobs have too
                many files.
        """
        now = self._clock()
        with self.database.writing() as connection:
            found = _get(connection, job)
            if action not in allowed_actions(found.state, is_archived=found.archived):
                raise JobActionError(_refusal(found, action))
            if _WANTED.get(action) == State.queued and found.wanted != State.queued:
                if max_waiting is not None:
                    _check_waiting(connection, found.owner, 1, max_waiting)
                if max_disk_bytes is not None:
                    _check_disk(connection, found.owner, max_disk_bytes)
            text = json.dumps(dict(arguments or {}), sort_keys=True)
            is_asked = connection.execute(
                "SELECT 1 FROM requests WHERE job = ? AND action = ? AND arguments = ?",
                (job, action, text),
            ).fetchone()
            if not is_asked:
                connection.execute(
                    "INSERT INTO requests (job, action, arguments, by, time) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (job, action, text, by, now),
                )
                data = {"action": action, "arguments": arguments or {}, "by": by}
                add_event(connection, job, now, "request", data)
            if action in _WANTED:
                connection.execute(
                    "UPDATE jobs SET wanted = ? WHERE id = ?", (_WANTED[action], job)
                )
            return self._waiting([_get(connection, job)], connection)[0]

    def transitions(self, job: str) -> list[Event]:
        """Return the states that a job has been in, oldest first."""
        return [event for event in self.events_after(0, job=job) if event.kind == "state"]

    def events_after(
        self, number: int, *, job: str | None = None, limit: int = 1000
    ) -> list[Event]:
        """Return events, oldest first.

        Args:
            number: those after this one.
            job: of this job; None: of all.
            limit: at most so many.
        """
        condition = "" if job is None else " AND job = ?"
        values: list[Any] = [number] if job is None else [number, job]
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM events WHERE number > ?{condition} ORDER BY number LIMIT ?",  # noqa: S608 -- our own text
                [*values, limit],
            )
            return [event_of(row) for row in rows]

    def last_event(self) -> int:
        """Return the number of the newest event; 0 if there is none."""
        with self.database.reading() as connection:
            return connection.execute("SELECT COALESCE(MAX(number), 0) FROM events").fetchone()[0]

    def dispatcher(self) -> DispatcherInfo | None:
        """Return who starts the jobs, or started them last; None if nobody ever has."""
        with self.database.reading() as connection:
            return _dispatcher(connection)

    def _waiting(self, jobs: list[Job], connection: sqlite3.Connection) -> list[Job]:
        """Return jobs with what each one that waits does so for."""
        if not any(job.state in WAITING for job in jobs):
            return jobs
        about = _dispatcher(connection)
        if about is None:
            return _each_waiting(jobs, lambda _: _NO_DISPATCHER)
        if self._clock() - about.seen > _SILENT_S:
            return _each_waiting(jobs, lambda _: _SILENT_DISPATCHER)
        places = _places(connection, [job.id for job in jobs if job.state == State.queued])
        return _each_waiting(jobs, lambda job: _waits_for(job, about, places.get(job.id)))


def add_event(
    connection: sqlite3.Connection, job: str, now: float, kind: str, data: Mapping[str, Any]
) -> None:
    """Add an event to those of a job, in the transaction that is under way."""
    connection.execute(
        "INSERT INTO events (job, time, kind, data) VALUES (?, ?, ?, ?)",
        (job, now, kind, json.dumps(data)),
    )


def _new_id() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(_ID_LETTERS))


def _digest(specs: Sequence[JobSpec], sweep_name: str | None) -> str:
    text = json.dumps([sweep_name, *(spec.to_json() for spec in specs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _submitted(
    connection: sqlite3.Connection, owner: str, key: str, digest: str, now: float
) -> list[str] | None:
    """Return the jobs that a key was used for within a day, or None."""
    connection.execute("DELETE FROM submissions WHERE time < ?", (now - _IDEMPOTENCY_S,))
    row = connection.execute(
        "SELECT digest, jobs FROM submissions WHERE owner = ? AND key = ?", (owner, key)
    ).fetchone()
    if row is None:
        return None
    if row["digest"] != digest:
        raise SubmissionError(
            f"Idempotency-Key {key[:40]!r} was used for another submission; choose a new one"
        )
    return json.loads(row["jobs"])


def _check_waiting(connection: sqlite3.Connection, owner: str, new: int, limit: int) -> None:
    waiting = connection.execute(
        "SELECT COUNT(*) FROM jobs WHERE owner = ? AND state IN (?, ?)", (owner, *sorted(WAITING))
    ).fetchone()[0]
    # And those that are about to, as they were asked to go on.
    waiting += connection.execute(
        "SELECT COUNT(DISTINCT job) FROM requests JOIN jobs ON jobs.id = job "
        "WHERE owner = ? AND wanted = ? AND state NOT IN (?, ?)",
        (owner, State.queued, *sorted(WAITING)),
    ).fetchone()[0]
    if waiting + new > limit:
        raise JobLimitError(
            f"{waiting} jobs of {owner} wait already, and at most {limit} may: wait until some "
            f"have begun, or cancel some, before {new} more may wait"
        )


def _check_disk(connection: sqlite3.Connection, owner: str, limit_bytes: int) -> None:
    used_bytes = connection.execute(
        "SELECT COALESCE(SUM(size_bytes), 0) FROM jobs WHERE owner = ?", (owner,)
    ).fetchone()[0]
    if used_bytes >= limit_bytes:
        raise JobLimitError(
            f"the files of the jobs of {owner} have {used_bytes} bytes, and at most {limit_bytes} "
            "are allowed: archive some that have ended before more may wait"
        )


def _insert(
    connection: sqlite3.Connection, spec: JobSpec, owner: str, sweep: str | None, now: float
) -> str:
    job = _new_id()
    connection.execute(
        "INSERT INTO jobs (id, name, owner, state, sweep, sweep_values, spec, priority, cores, "
        "device, submitted) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job,
            spec.name,
            owner,
            State.submitted,
            sweep,
            json.dumps(dict(spec.sweep_values)),
            json.dumps(spec.to_json()),
            spec.priority,
            spec.nproc if spec.cores is None else spec.cores,
            spec.device,
            now,
        ),
    )
    data = {"state": State.submitted, "reason_code": None, "reason": "", "by": owner}
    add_event(connection, job, now, "state", data)
    return job


def _get(connection: sqlite3.Connection, job: str) -> Job:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is None:
        raise JobNotFoundError(f"there is no job {job[:40]!r}; GET /v1/jobs lists those that are")
    return job_of(row)


def _number(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise SubmissionError(f"cursor={cursor[:40]}: use what `next` of the page before said")
    return int(cursor)


def _refusal(job: Job, action: Action) -> str:
    if job.archived:
        return f"job {job.id} is archived, and cannot {action} any more"
    valid = ", ".join(allowed_actions(job.state)) or "nothing"
    return (
        f"job {job.id} is {job.state}: {action} is for jobs that are "
        f"{', '.join(states_for(action))}; now it may {valid}"
    )


def _dispatcher(connection: sqlite3.Connection) -> DispatcherInfo | None:
    row = connection.execute("SELECT about FROM dispatcher").fetchone()
    return None if row is None else DispatcherInfo(**json.loads(row["about"]))


# A dispatcher says each second that it lives.
_SILENT_S = 10.0


_NO_DISPATCHER = "a dispatcher, of which none runs: start one with syncbn-dispatch"
# It may be busy with a machine that has much else to do.
_SILENT_DISPATCHER = (
    "the dispatcher, which has been silent for more than 10 s: if it has ended, start one with "
    "syncbn-dispatch"
)


def _each_waiting(jobs: list[Job], describe: Callable[[Job], str]) -> list[Job]:
    return [
        replace(job, waiting_for=describe(job)) if job.state in WAITING else job for job in jobs
    ]


def _places(connection: sqlite3.Connection, jobs: Sequence[str]) -> dict[str, int]:
    """Return the places in the queue that jobs have, from 1, in one go over all that wait."""
    if not jobs:
        return {}
    rows = connection.execute(
        "SELECT id, place FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY rank, number) AS place "
        "FROM jobs WHERE state = ?) WHERE id IN (SELECT value FROM json_each(?))",
        (State.queued, json.dumps(jobs)),
    )
    return {row[0]: row[1] for row in rows}


def _waits_for(job: Job, about: DispatcherInfo, place: int | None) -> str:
    """Return what a job waits for, such as "2 cores, 1 free; third in line"."""
    if place is None:
        return "the dispatcher to look at it"
    line = f"{_ordinal(place)} in line"
    if not about.cores:
        return f"{about.engine} to take it; {line}"
    # A dispatcher before this one may have had more.
    lack = f"of which the dispatcher has {about.cores}"
    there = lack if job.cores > about.cores else f"{about.free_cores} free"
    parts = [f"{job.cores} core{'s' * (job.cores != 1)}, {there}"]
    if job.gpus:
        parts.append(f"{job.gpus} GPU{'s' * (job.gpus != 1)}, {about.free_gpus} free")
    return "; ".join([*parts, line])


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


def _ordinal(number: int) -> str:
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    endings = {1: "st", 2: "nd", 3: "rd"}
    ending = "th" if number % 100 in (11, 12, 13) else endings.get(number % 10, "th")
    return f"{number}{ending}"
