"""Whatever is killed, each job ends once, as if nothing had been, or says that it is lost."""

import os
import random
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from scripts.bench.jobs.outcome import look
from syncbn.jobs.states import Action, State
from tests.support.dispatching import DIGITS, TINY, Place, never_twice, until

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a job that nobody disturbs."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    try:
        job = place.submit(DIGITS)
        place.dispatch()
        place.wait_for([job], [State.finished])
        return place.bundle(job)
    finally:
        place.close()


@pytest.fixture
def place(tmp_path: Path) -> Generator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def _kill_dispatcher(place: Place, job: str) -> None:
    place.kill_dispatcher()
    place.dispatch()


def _kill_supervisor(place: Place, job: str) -> None:
    os.kill(place.supervisor(job), signal.SIGKILL)


def _kill_rank(place: Place, job: str) -> None:
    os.kill(place.ranks(job)[-1], signal.SIGKILL)


def _crash_rank(place: Place, job: str) -> None:
    os.kill(place.ranks(job)[0], signal.SIGSEGV)


def _kill_everything(place: Place, job: str) -> None:
    place.kill_dispatcher()
    place.kill_jobs()
    place.dispatch()


def _kill_job_while_nobody_looks(place: Place, job: str) -> None:
    place.kill_dispatcher()
    place.kill_jobs()
    until(lambda: not place.workspace(job).is_held(), str)
    place.dispatch()


@pytest.mark.parametrize(
    ("kill", "attempts"),
    [
        (_kill_dispatcher, 1),
        (_kill_supervisor, 2),
        (_kill_rank, 1),
        (_crash_rank, 1),
        (_kill_everything, 2),
        (_kill_job_while_nobody_looks, 2),
    ],
)
def test_job_ends_as_if_nothing_had_been_killed(
    place: Place, undisturbed: bytes, kill: Callable[[Place, str], None], attempts: int
) -> None:
    job = place.submit(DIGITS, retries=1)
    place.dispatch()
    with never_twice(place, [job]):
        place.wait_for_steps(job, 20)
        kill(place, job)
        (ended,) = place.wait_for([job])
    assert (ended.state, ended.attempt) == (State.finished, attempts)
    assert place.attempts(job) == attempts
    assert place.bundle(job) == undisturbed
    results = place.workspace(job).run.read_attempts()
    assert [result.status for result in results].count("finished") == 1
    assert len(results) == attempts


def test_job_without_retries_is_lost_with_a_reason_and_may_be_tried_again(
    place: Place, undisturbed: bytes
) -> None:
    job = place.submit(DIGITS)
    place.dispatch()
    place.wait_for_steps(job, 20)
    _kill_supervisor(place, job)
    (lost,) = place.wait_for([job])
    assert (lost.state, lost.reason_code) == (State.lost, "killed")
    assert lost.reason == "it ended without a word: killed, most likely"
    place.store.request(job, Action.retry, by="anna")
    place.wait_for([job], [State.finished])
    assert place.bundle(job) == undisturbed


def test_job_whose_end_nobody_saw_is_finished_and_not_run_again(place: Place) -> None:
    job = place.submit(TINY)
    place.dispatch()
    run = place.workspace(job).run
    until(run.config_file.exists, str)
    until(lambda: place.workspace(job).is_held(), str)
    place.kill_dispatcher()
    until(lambda: run.read_result() is not None and not place.workspace(job).is_held(), str)
    place.dispatch()
    (ended,) = place.wait_for([job])
    assert (ended.state, ended.attempt, place.attempts(job)) == (State.finished, 1, 1)


def test_request_that_the_dispatcher_did_not_live_to_carry_out_is_carried_out(
    place: Place,
) -> None:
    # Longer than a dispatcher takes to start on a machine with much else to do.
    job = place.submit({**DIGITS, "values": {**DIGITS["values"], "epochs": 40}})
    place.dispatch()
    place.wait_for_steps(job, 5)
    place.kill_dispatcher()
    place.store.request(job, Action.pause, by="anna")
    place.dispatch()
    (paused,) = place.wait_for([job], [State.paused])
    assert not place.workspace(job).is_held()
    assert paused.wanted is None
    place.store.request(job, Action.resume, by="anna")
    place.wait_for([job], [State.finished])
    assert place.attempts(job) == 2


def test_dispatcher_killed_at_random_instants_runs_each_job_of_a_sweep_once(place: Place) -> None:
    jobs = place.submit_sweep(TINY, seed=list(range(12)))
    chance = random.Random(21)
    with never_twice(place, jobs):
        for _ in range(20):
            place.dispatch()
            # From before it has the store to after jobs have ended.
            time.sleep(chance.uniform(0.2, 8.0))
            place.kill_dispatcher()
        place.dispatch()
        place.wait_for(jobs)
    outcome = look(place.jobs, jobs)
    assert outcome.wrong == []
    assert outcome.attempts == {1: len(jobs)}


def test_jobs_killed_at_random_instants_all_end(place: Place) -> None:
    jobs = place.submit_sweep({**TINY, "retries": 10}, seed=list(range(8)))
    place.dispatch()
    chance = random.Random(22)
    with never_twice(place, jobs):
        for _ in range(10):
            time.sleep(chance.uniform(0.2, 3.0))
            place.kill_jobs()
        place.wait_for(jobs)
    assert look(place.jobs, jobs).wrong == []
