"""From rows of the database to values."""

import json
import sqlite3

from syncbn.jobs.job import Event, Job
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import State


def job_of(row: sqlite3.Row) -> Job:
    """Return the job that a row of the table jobs holds."""
    return Job(
        id=row["id"],
        number=row["number"],
        name=row["name"],
        owner=row["owner"],
        state=State(row["state"]),
        reason_code=row["reason_code"],
        reason=row["reason"],
        wanted=None if row["wanted"] is None else State(row["wanted"]),
        sweep=row["sweep"],
        sweep_values=json.loads(row["sweep_values"]),
        spec=JobSpec.from_json(json.loads(row["spec"])),
        cores=row["cores"],
        gpus=row["gpus"],
        device=row["device"],
        attempt=row["attempt"],
        failures=row["failures"],
        handle=row["handle"],
        placement=json.loads(row["placement"]),
        arguments=json.loads(row["arguments"]),
        published=json.loads(row["published"]),
        progress=None if row["progress"] is None else json.loads(row["progress"]),
        objective=row["objective"],
        submitted=row["submitted"],
        queued=row["queued"],
        started=row["started"],
        ended=row["ended"],
        archived=bool(row["archived"]),
    )


def event_of(row: sqlite3.Row) -> Event:
    """Return the event that a row of the table events holds."""
    return Event(row["number"], row["job"], row["time"], row["kind"], json.loads(row["data"]))
