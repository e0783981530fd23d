"""What the dispatcher alone writes of jobs: their states, progress and ends."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from syncbn.jobs.job import DispatcherInfo, Footprint, Job, Request
from syncbn.jobs.states import ACTIVE, ARROWS, State
from syncbn.jobs.store.rows import job_of
from syncbn.jobs.store.store import Store, add_event

_ACTIVE = ", ".join(f"'{state}'" for state in sorted(ACTIVE))
# What `move` may set besides the state.
_COLUMNS = frozenset(
    {
        "wanted", "rank", "cores", "gpus", "device", "attempt", "failures", "handle", "placement",
        "arguments", "published", "objective", "queued", "started", "ended",
    }
)  # fmt: skip
_JSON = frozenset({"placement", "arguments", "published"})


class Ledger:
    """The one writer of states.

    Each method is one transaction, or a part of that of `together`, so that a kill leaves a job
    where it was or where it was to go.

    Args:
        store: in which the jobs are.
        clock: returns the time in Unix seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._database = store.database
        self._clock = clock

    def together(self) -> AbstractContextManager[object]:
        """Have all that is written within the context be written or nothing, in one go.

        Each write to the disk takes milliseconds.
        """
        return self._database.writing()

    def jobs(self, states: Sequence[State], limit: int = -1) -> list[Job]:
        """Return the jobs in some states, those first that were submitted first.

        Args:
            states: in one of these.
            limit: at most so many; -1: all.
        """
        marks = ", ".join("?" * len(states))
        with self._database.reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY number LIMIT ?",  # noqa: S608 -- our own text
                [*map(str, states), limit],
            )
            return [job_of(row) for row in rows]

    def footprints(self) -> list[Footprint]:
        """Return of all jobs what decides how long their files stay."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT id, number, state, archived, ended, published != '[]' FROM jobs"
            )
            return [
                Footprint(id_, number, State(state), bool(archived), ended, bool(published))
                for id_, number, state, archived, ended, published in rows
            ]

    def queue(
        self,
        limit: int,
        cores_of: Mapping[str, int],
        cores_per_owner: int | None = None,
        *,
        most_cores: int | None = None,
        most_gpus: int | None = None,
    ) -> list[Job]:
        """Return the jobs whose turn comes next, without those that nothing can make room for now.

        Those are held back by their owners' limits, or need more than there is of everything, as a
        dispatcher before this one had more. They keep their places, and keep nobody from starting.

        Args:
            limit: at most so many.
            cores_of: how many cores the running jobs of each owner have.
            cores_per_owner: how many they may have; None: all there are.
            most_cores: how many cores a job may need; None: any number.
            most_gpus: likewise.
        """
        condition, values = "", list[Any]()
        for column, most in (("cores", most_cores), ("gpus", most_gpus)):
            if most is not None:
                condition += f"AND {column} <= ? "
                values.append(most)
        if cores_per_owner is not None:
            # Or many jobs of one owner would hide those of others behind them.
            condition += (
                "AND cores + COALESCE((SELECT value FROM json_each(?) WHERE key = owner), 0) <= ? "
            )
            values += [json.dumps(dict(cores_of)), cores_per_owner]
        with self._database.reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM jobs WHERE state = ? {condition}ORDER BY rank, number LIMIT ?",  # noqa: S608 -- our own text
                [State.queued, *values, limit],
            )
            return [job_of(row) for row in rows]

    def requests(self) -> list[Request]:
        """Return what users asked for and nobody has done yet, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT number, job, action, arguments, by FROM requests ORDER BY number"
            )
            return [
                Request(number, job, action, json.loads(arguments), by)
                for number, job, action, arguments, by in rows
            ]

    def move(
        self,
        job: Job,
        state: State,
        reason_code: str | None,
        reason: str,
        *,
        request: Request | None = None,
        **columns: Any,
    ) -> Job:
        """Bring a job into a state, and return it as it is then.

        Args:
            job: as it is now.
            state: where it goes.
            reason_code: why, for programs.
            reason: why, as a sentence.
            request: what is done by it.
            columns: what else changes.
        """
        assert state in ARROWS[job.state], f"{job.id}: {job.state} → {state}"
        assert columns.keys() <= _COLUMNS
        now = self._clock()
        stored = {
            key: json.dumps(value) if key in _JSON else value for key, value in columns.items()
        }
        stored |= {"state": state, "reason_code": reason_code, "reason": reason}
        names = ", ".join(f"{key} = ?" for key in stored)
        with self._database.writing() as connection:
            changed = connection.execute(
                f"UPDATE jobs SET {names} WHERE id = ? AND state = ?",  # noqa: S608 -- our own text
                [*stored.values(), job.id, job.state],
            ).rowcount
            assert changed == 1, f"{job.id} is not {job.state} any more"
            data = {
                "state": state,
                "reason_code": reason_code,
                "reason": reason,
                "by": request.by if request else "dispatcher",
                "attempt": columns.get("attempt", job.attempt),
            }
            add_event(connection, job.id, now, "state", data)
            if request is not None:
                connection.execute("DELETE FROM requests WHERE number = ?", (request.number,))
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job.id,)).fetchone()
        return job_of(row)

    def get(self, job: str) -> Job | None:
        """Return a job, or None if there is none."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        return None if row is None else job_of(row)

    def note_handle(self, job: Job, handle: str) -> None:
        """Write by what the engine knows the attempt that it was told to start."""
        with self._database.writing() as connection:
            connection.execute("UPDATE jobs SET handle = ? WHERE id = ?", (handle, job.id))

    def note_reasons(self, reasons: Mapping[str, tuple[str | None, str]]) -> None:
        """Write why jobs stay where they are: of each, a code and a sentence."""
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE jobs SET reason_code = ?, reason = ? WHERE id = ?",
                [(code, reason, job) for job, (code, reason) in reasons.items()],
            )

    def note_progress(self, progress: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what the trainers said last, of each job."""
        with self._database.writing(is_lasting=False) as connection:
            connection.executemany(
                "UPDATE jobs SET progress = ? WHERE id = ?",
                [(json.dumps(said), job) for job, said in progress.items()],
            )

    def note_sizes(self, sizes_bytes: Mapping[str, int]) -> None:
        """Write how large the files of jobs are."""
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE jobs SET size_bytes = ? WHERE id = ? AND size_bytes != ?",
                [(size, job, size) for job, size in sizes_bytes.items()],
            )

    def done(self, request: Request, kind: str, data: Mapping[str, Any], **columns: Any) -> None:
        """Write that a request is done, or why it is not, which changes no state.

        Args:
            request: which one.
            kind: of the event.
            data: of the event.
            columns: what changes in the job.
        """
        now = self._clock()
        assert columns.keys() <= {"published", "archived", "wanted"}
        with self._database.writing() as connection:
            for key, value in columns.items():
                stored = json.dumps(value) if key in _JSON else value
                connection.execute(
                    f"UPDATE jobs SET {key} = ? WHERE id = ?",  # noqa: S608 -- our own text
                    (stored, request.job),
                )
            connection.execute("DELETE FROM requests WHERE number = ?", (request.number,))
            add_event(connection, request.job, now, kind, {**data, "by": request.by})

    def note(self, job: Job, text: str) -> None:
        """Write into a job's history what changes no state."""
        now = self._clock()
        with self._database.writing() as connection:
            add_event(connection, job.id, now, "note", {"text": text, "by": "dispatcher"})

    def archive(self, job: str, reason: str) -> None:
        """Put a job away."""
        now = self._clock()
        with self._database.writing() as connection:
            connection.execute("UPDATE jobs SET archived = 1 WHERE id = ?", (job,))
            add_event(connection, job, now, "note", {"text": reason, "by": "dispatcher"})

    def active_count(self) -> int:
        """Return how many jobs have cores."""
        with self._database.reading() as connection:
            return connection.execute(
                f"SELECT COUNT(*) FROM jobs WHERE state IN ({_ACTIVE})"  # noqa: S608 -- our own text
            ).fetchone()[0]

    def cores_by_owner(self) -> dict[str, int]:
        """Return how many cores the running jobs of each owner have."""
        with self._database.reading() as connection:
            rows = connection.execute(
                f"SELECT owner, SUM(cores) FROM jobs WHERE state IN ({_ACTIVE}) GROUP BY owner"  # noqa: S608 -- our own text
            )
            return {row[0]: row[1] for row in rows}

    def say_alive(self, about: DispatcherInfo) -> None:
        """Write who the dispatcher is, and that it lives."""
        text = json.dumps(dataclasses.asdict(about))
        with self._database.writing(is_lasting=False) as connection:
            connection.execute("INSERT OR REPLACE INTO dispatcher VALUES (1, ?)", (text,))
