"""What is measured of a service of jobs: submissions, starts, lists, and many jobs with kills."""

import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts import REPOSITORY
from scripts.bench.jobs.outcome import Outcome, look
from scripts.bench.jobs.processes import Platform, killed_now_and_then, running
from scripts.bench.jobs.submit import submit
from scripts.bench.measure import Rows, progress
from syncbn.jobs.states import ENDED, State
from syncbn.jobs.store.store import Store

LISTS = 20
_LOOK_S = 0.2


def submit_from_clients(url: str, jobs: int, clients: int) -> tuple[float, set[str]]:
    """Have several processes submit jobs at once; return how many a second, and their names."""
    counts = [jobs // clients + (each < jobs % clients) for each in range(clients)]
    module = [sys.executable, "-m", "scripts.bench.jobs.submit", url]
    processes = [
        subprocess.Popen(
            [*module, f"client-{number}", str(count)], cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        for number, count in enumerate(counts)
    ]
    told: list[dict[str, Any]] = []
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"a client ended with {process.returncode}")
        told.append(json.loads(output))
    ids = {each for client in told for each in client["ids"]}
    return jobs / max(client["seconds"] for client in told), ids


def measure_submissions(directory: Path, jobs: int, clients: int) -> float:
    """Return how many submissions a second are answered by a service that nobody kills."""
    directory.mkdir()
    with running(directory, 0, dispatches=False) as platform:
        rate, ids = submit_from_clients(platform.url, jobs, clients)
        assert len(ids) == jobs
    progress({"submissions": f"{rate:.0f} a second"})
    return rate


def measure_starts(platform: Platform, starts: int) -> dict[str, float]:
    """Submit jobs to an idle dispatcher, one after the other; return medians in seconds."""
    taken: dict[str, list[float]] = {"started": [], "running": [], "ended": []}
    with _opened(platform.jobs) as store:
        for number in range(starts + 1):
            (job,) = submit(platform.url, f"start-{number}", 1)
            _wait_until(lambda job=job: store.get(job).state in ENDED, 600)
            if number == 0:  # for which the fork server has loaded torch
                continue
            times = {event.data["state"]: event.time for event in store.transitions(job)}
            begun = times[State.submitted]
            taken["started"].append(times[State.starting] - begun)
            taken["running"].append(times[State.running] - begun)
            taken["ended"].append(times[State.finished] - begun)
            progress({"start": number, **{name: each[-1] for name, each in taken.items()}})
    return {name: statistics.median(each) for name, each in taken.items()}


def measure_lists(url: str) -> dict[str, float]:
    """Return the median seconds of the first page of the list, by the API and as a page."""
    seconds: dict[str, float] = {}
    for name, path in (("list", "/v1/jobs"), ("page", "/jobs")):
        taken: list[float] = []
        for _ in range(LISTS):
            start = time.perf_counter()
            with urllib.request.urlopen(url + path, timeout=60) as answer:  # noqa: S310 -- our own
                answer.read()
            taken.append(time.perf_counter() - start)
        seconds[name] = statistics.median(taken)
    return seconds


def measure_many(
    platform: Platform,
    jobs: int,
    clients: int,
    others: set[str],
    *,
    kill_every_s: float,
    kills: int,
) -> tuple[dict[str, float], Rows, Outcome]:
    """Submit many jobs at once, and wait for their ends; kills come until half have ended.

    Args:
        platform: what is asked.
        jobs: how many.
        clients: that submit them.
        others: jobs that are there already.
        kill_every_s: seconds from one kill to the next, about.
        kills: at most so many times, and while less than half of the jobs have ended.

    Returns:
        Seconds and counts; memory and descriptors at the start, middle and end of the second half;
        and what became of all jobs.
    """
    assert platform.dispatcher is not None
    begun = platform.service.starts + platform.dispatcher.starts
    start = time.monotonic()
    usage: Rows = []
    with killed_now_and_then(platform, kill_every_s, kills) as kills_ended:
        _, ids = submit_from_clients(platform.url, jobs, clients)
        submitted_s = time.monotonic() - start
        with _opened(platform.jobs) as store:
            timeout_s = 600 + 60.0 * jobs

            def wait_for(share: float) -> None:
                def have_ended() -> bool:
                    counts = store.counts()
                    return sum(counts.get(state, 0) for state in ENDED) - len(others) >= least

                least = share * jobs
                _wait_until(have_ended, timeout_s)
                progress({"ended": f"{least:.0f} of {jobs} after {time.monotonic() - start:.0f} s"})

            wait_for(0.25)
            wait_for(0.5)
            kills_ended.set()
            killed = platform.service.starts + platform.dispatcher.starts - begun
            _wait_until(lambda: _answers(platform.url), 600)
            lists = measure_lists(platform.url)
            for moment, share in (("start", 0.55), ("middle", 0.75), ("end", 1.0)):
                wait_for(share)
                measure_lists(platform.url)  # so that all that is loaded late is loaded
                usage.append({"second half": moment, **platform.usage()})
    whole_s = time.monotonic() - start
    seconds = {"submitted": submitted_s, "whole": whole_s, "kills": killed, **lists}
    return seconds, usage, look(platform.jobs, ids | others)


@contextmanager
def _opened(jobs: Path) -> Generator[Store]:
    store = Store(jobs)
    try:
        yield store
    finally:
        store.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:  # noqa: S310 -- our own
            return answer.status == 200
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited {timeout_s:g} s in vain")
        time.sleep(_LOOK_S)
