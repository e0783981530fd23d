"""What became of jobs, by the store and by the files that their processes wrote."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from syncbn.jobs.states import ENDED, State
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace

_HEADER = re.compile(rb"^=== attempt ", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How jobs ended.

    Attributes:
        states: how many are in each state.
        finished_once: how many trained to their end in one attempt of all that they had.
        attempts: how many jobs were begun how often.
        wrong: what is not as it must be, a sentence each.
    """

    states: Counter[str]
    finished_once: int
    attempts: Counter[int]
    wrong: list[str]


def look(directory: Path, submitted: set[str]) -> Outcome:
    """Return what became of the jobs of a store.

    Args:
        directory: of the store.
        submitted: the identifiers that clients were told, which must be those of all jobs.
    """
    store = Store(directory)
    states, attempts, wrong, finished_once = Counter[str](), Counter[int](), list[str](), 0
    try:
        stored: set[str] = set()
        cursor, has_more = None, True
        while has_more:
            page = store.select(cursor=cursor, limit=500)
            cursor, has_more = page.next, page.next is not None
            for job in page.jobs:
                stored.add(job.id)
                states[job.state] += 1
                workspace = Workspace.of_job(directory, job.id)
                results = workspace.run.read_attempts()
                finished = sum(result.status == "finished" for result in results)
                finished_once += finished == 1
                attempts[_begun(workspace)] += 1
                if finished != 1:
                    wrong.append(f"{job.id} is {job.state}, and finished {finished} times")
                ends = [event.data["state"] for event in store.transitions(job.id)]
                if sum(end in ENDED for end in ends) != 1 or job.state != State.finished:
                    wrong.append(f"{job.id} went through {', '.join(ends)}: {job.reason}")
    finally:
        store.close()
    if stored != submitted:
        wrong.append(
            f"{len(submitted - stored)} jobs are not there that were submitted, and "
            f"{len(stored - submitted)} are that nobody was told of"
        )
    return Outcome(states, finished_once, attempts, wrong)


def _begun(workspace: Workspace) -> int:
    """Return how many attempts have begun to print."""
    try:
        return len(_HEADER.findall(workspace.console.read_bytes()))
    except FileNotFoundError:
        return 0
