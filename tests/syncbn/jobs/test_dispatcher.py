"""What becomes of jobs: starts, retries, ends, what users ask for, and what is told of it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from syncbn.jobs.dispatch.dispatcher import Dispatcher
from syncbn.jobs.dispatch.slots import Capacity, Sharing
from syncbn.jobs.job import DispatcherInfo, Job
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import Action, State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.train.run.directory import Result
from tests.support.job_world import Clock, Killed, World, new_dispatcher

_FINISHED = Result("finished", None, {}, 1, 0, objective=0.25, reason="finished")
_CRASHED = Result("failed", "rank 1 was killed by SIGKILL", {}, 1, 1, reason="rank_killed")
_INVALID = Result("failed", "optim.lr=-1", {}, 0, 2, reason="config")


class Bench:
    """A store, a world and a dispatcher with two cores."""

    def __init__(self, directory: Path) -> None:
        self.clock, self.world = Clock(), World()
        self.store = Store(directory, lambda: self.clock.wall)
        self.dispatcher = self.new()

    def new(self, capacity: Capacity | None = None, sharing: Sharing | None = None) -> Dispatcher:
        self.dispatcher = new_dispatcher(
            self.store,
            self.world,
            self.clock,
            capacity=capacity or Capacity((0, 1)),
            sharing=sharing,
        )
        return self.dispatcher

    def submit(self, owner: str = "anna", **spec: Any) -> str:
        given: dict[str, object] = {"name": "job", "cores": 2, "nproc": 1}
        values: dict[str, object] = given | spec
        return self.store.submit([JobSpec.from_json(values)], owner=owner)[0].id

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.dispatcher.step()
            self.clock.pass_by(6)

    def job(self, job: str) -> Job:
        return self.store.get(job)

    def states(self, job: str) -> list[str]:
        return [event.data["state"] for event in self.store.transitions(job)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def test_job_goes_from_submission_to_its_end(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    assert bench.job(job).state == State.running
    assert bench.job(job).placement == {"cores": [0, 1], "gpus": []}
    bench.world.end(job, _FINISHED)
    bench.step()
    ended = bench.job(job)
    assert (ended.state, ended.reason_code, ended.objective) == ("finished", "finished", 0.25)
    assert ended.ended == bench.clock.wall - 6
    assert bench.states(job) == ["submitted", "queued", "starting", "running", "finished"]


def test_jobs_wait_for_cores_and_say_so(bench: Bench) -> None:
    first, second, third = bench.submit(), bench.submit(cores=1), bench.submit(priority=5)
    bench.step()
    Ledger(bench.store).say_alive(
        DispatcherInfo(1, "here", "local", 2, 0, 0, 0, 0.0, bench.clock.wall)
    )
    assert bench.job(third).state == State.starting  # its priority is the highest
    assert bench.job(first).waiting_for == "2 cores, 0 free; first in line"
    assert bench.job(second).waiting_for == "1 core, 0 free; second in line"


def test_thousands_of_jobs_are_let_in_by_and_by(bench: Bench) -> None:
    spec = JobSpec.from_json({"name": "job", "cores": 2, "nproc": 1})
    bench.store.submit([spec] * 1200, owner="anna")
    assert bench.dispatcher.step()  # there is more to do at once
    assert bench.store.counts() == {"starting": 1, "queued": 499, "submitted": 700}
    assert bench.dispatcher.step()
    assert not bench.dispatcher.step()
    assert bench.store.counts() == {"running": 1, "queued": 1199}


def test_jobs_are_let_in_together_or_not_at_all(bench: Bench) -> None:
    for _ in range(3):
        bench.submit()
    left: list[int] = []
    for point in range(20):
        bench.world.killed_after = point
        with suppress(Killed):
            bench.dispatcher.step()
        left.append(bench.store.counts().get("submitted", 0))
        bench.new()
    assert set(left) == {0, 3}


def test_queued_job_says_that_no_dispatcher_runs(bench: Bench) -> None:
    job = bench.submit()
    assert "none runs: start one with syncbn-dispatch" in bench.job(job).waiting_for


def test_dispatcher_that_is_silent_is_not_said_to_have_ended(bench: Bench) -> None:
    job = bench.submit()
    Ledger(bench.store).say_alive(
        DispatcherInfo(1, "here", "local", 2, 0, 0, 0, 0.0, bench.clock.wall - 11)
    )
    assert bench.job(job).waiting_for.startswith("the dispatcher, which has been silent for more")


def test_waiting_makes_up_for_priority(bench: Bench) -> None:
    bench.new(sharing=Sharing(aging_s=100))
    running = bench.submit()
    bench.step()
    low = bench.submit(priority=0)
    bench.step()
    bench.clock.pass_by(250)
    high = bench.submit(priority=2)
    bench.step()
    bench.world.end(running, _FINISHED)
    bench.step()
    assert (bench.job(low).state, bench.job(high).state) == ("starting", "queued")


def test_small_jobs_go_first_for_a_while_and_not_for_ever(bench: Bench) -> None:
    bench.new(Capacity((0, 1)), Sharing(patience_s=100))
    bench.submit(cores=1)
    bench.step()
    bench.submit(cores=2)
    early = bench.submit(cores=1)
    bench.step()
    assert bench.job(early).state == State.starting
    bench.world.end(early, _FINISHED)
    bench.clock.pass_by(200)
    late = bench.submit(cores=1)
    bench.step(3)
    assert bench.job(late).state == State.queued


def test_cores_that_are_offered_twice_are_shared_evenly(bench: Bench) -> None:
    bench.new(Capacity((0, 1, 0, 1)))
    jobs = [bench.submit(cores=1), bench.submit(cores=2), bench.submit(cores=1)]
    bench.step()
    cores = [bench.job(job).placement["cores"] for job in jobs]
    assert cores == [[0], [1, 0], [1]]
    bench.submit(cores=1)
    bench.step()
    assert bench.store.counts()["queued"] == 1
    bench.world.end(jobs[1], _FINISHED)
    last = bench.submit(cores=1)
    bench.step()
    assert "queued" not in bench.store.counts()
    assert bench.job(last).placement["cores"] == [1]


def test_owner_has_no_more_cores_than_allowed(bench: Bench) -> None:
    bench.new(Capacity((0, 1, 2, 3)), Sharing(cores_per_owner=2))
    ours = [bench.submit(), bench.submit()]
    theirs = bench.submit(owner="ben")
    bench.step()
    assert [bench.job(job).state for job in (*ours, theirs)] == ["starting", "queued", "starting"]


def test_many_jobs_of_one_owner_hide_no_others(bench: Bench) -> None:
    bench.new(Capacity((0, 1, 2, 3)), Sharing(cores_per_owner=3))
    spec = JobSpec.from_json({"name": "job", "cores": 2, "nproc": 1})
    bench.store.submit([spec] * 400, owner='anna "a"')
    theirs = bench.submit(owner="ben")
    bench.step(2)
    assert bench.job(theirs).state in (State.starting, State.running)
    assert bench.store.counts()["queued"] == 399


def test_no_two_jobs_get_one_gpu(bench: Bench) -> None:
    bench.new(Capacity((0, 1, 2, 3), (0, 1)))
    jobs = [bench.submit(cores=1, device="cuda") for _ in range(3)]
    bench.step()
    assert [bench.job(job).placement.get("gpus") for job in jobs] == [[0], [1], None]


def test_gpu_is_shared_if_that_is_asked_for(bench: Bench) -> None:
    bench.new(Capacity((0, 1, 2, 3), (0,), jobs_per_gpu=2))
    jobs = [bench.submit(cores=1) for _ in range(3)]
    bench.step()
    assert [bench.job(job).placement.get("gpus") for job in jobs] == [[0], [0], None]


@pytest.mark.parametrize(
    ("spec", "lacks"),
    [
        ({"cores": 3}, "3 cores, of which the dispatcher has 2"),
        ({"device": "cuda"}, "1 GPUs, of which the dispatcher has 0"),
    ],
)
def test_job_that_could_never_start_fails_at_once(
    bench: Bench, spec: dict[str, Any], lacks: str
) -> None:
    job = bench.submit(**spec)
    bench.step()
    assert (bench.job(job).state, bench.job(job).reason_code) == ("failed", "too_large")
    assert lacks in bench.job(job).reason


def test_job_that_a_smaller_dispatcher_has_no_room_for_keeps_nobody_waiting(bench: Bench) -> None:
    large = bench.submit(cores=2)
    bench.submit(cores=2, priority=1)
    bench.step()
    assert bench.job(large).state == State.queued
    bench.new(Capacity((0,)), Sharing(patience_s=0))
    bench.world.end(bench.store.select(states=[State.starting]).jobs[0].id, _FINISHED)
    small = bench.submit(cores=1)
    bench.step(2)
    Ledger(bench.store).say_alive(
        DispatcherInfo(1, "here", "local", 1, 0, 0, 0, 0.0, bench.clock.wall)
    )
    assert bench.job(small).state in (State.starting, State.running)
    waiting = bench.job(large)
    assert waiting.state == State.queued
    assert waiting.waiting_for == "2 cores, of which the dispatcher has 1; first in line"
    bench.world.end(small, _FINISHED)
    bench.new()
    bench.step(2)
    assert bench.job(large).state == State.running


def test_crash_is_repeated_as_often_as_allowed(bench: Bench) -> None:
    job = bench.submit(retries=1)
    bench.step()
    bench.world.end(job, _CRASHED)
    bench.step()
    assert bench.job(job).state == State.starting
    assert bench.job(job).attempt == 2
    bench.world.end(job, _CRASHED)
    bench.step()
    assert (bench.job(job).state, bench.job(job).reason_code) == ("failed", "rank_killed")


def test_replicas_that_start_again_in_place_use_up_retries_and_are_told_of(bench: Bench) -> None:
    job = bench.submit(retries=3)
    bench.step()
    for count in (1, 1, 2):
        bench.world.progress[job] = {"step": 1, "restarts": count}
        bench.step()
    texts = [
        event.data["text"] for event in bench.store.events_after(0, job=job) if event.kind == "note"
    ]
    assert [text[text.index("(") :] for text in texts] == [
        "(1 of 3 times in attempt 1); the log says why",
        "(2 of 3 times in attempt 1); the log says why",
    ]
    bench.world.end(job, None)
    bench.step()
    assert (bench.job(job).state, bench.job(job).failures) == ("starting", 3)
    bench.world.end(job, None)
    bench.step(2)
    assert (bench.job(job).state, bench.job(job).attempt) == ("lost", 2)


def test_wrong_configuration_is_not_repeated(bench: Bench) -> None:
    job = bench.submit(retries=5)
    bench.step()
    bench.world.end(job, _INVALID)
    bench.step()
    assert (bench.job(job).state, bench.job(job).attempt) == ("failed", 1)


def test_job_that_ends_without_a_word_is_lost(bench: Bench) -> None:
    job = bench.submit()
    bench.step()
    bench.world.end(job, None)
    bench.step()
    assert (bench.job(job).state, bench.job(job).reason_code) == ("lost", "killed")
    bench.store.request(job, Action.retry, by="anna")
    bench.step()
    assert bench.job(job).state == State.starting


def test_job_that_was_stopped_from_outside_goes_on(bench: Bench) -> None:
    job = bench.submit()
    bench.step()
    bench.world.end(job, Result("interrupted", "SIGTERM", {}, 1, 143, reason="stopped"))
    bench.step()
    assert (bench.job(job).state, bench.job(job).failures) == ("starting", 0)


@pytest.mark.parametrize(("action", "end"), [("cancel", "cancelled"), ("pause", "paused")])
def test_running_job_writes_its_state_before_it_ends(bench: Bench, action: str, end: str) -> None:
    job = bench.submit()
    bench.step(2)
    asked = bench.store.request(job, Action(action), by="anna")
    assert asked.wanted == end
    bench.step()
    assert bench.job(job).state == State.stopping
    bench.world.heed(job)
    bench.step()
    assert (bench.job(job).state, bench.job(job).wanted) == (end, None)


def test_job_that_does_not_heed_is_killed(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    bench.store.request(job, Action.cancel, by="anna")
    bench.step()
    bench.clock.pass_by(61)
    bench.step(2)
    assert bench.job(job).state == State.cancelled


@pytest.mark.parametrize(("action", "end"), [("cancel", "cancelled"), ("pause", "paused")])
def test_waiting_job_is_where_its_user_wants_it_at_once(
    bench: Bench, action: str, end: str
) -> None:
    job = bench.submit()
    bench.store.request(job, Action(action), by="anna")
    bench.step()
    assert (bench.job(job).state, bench.job(job).wanted) == (end, None)
    assert not bench.world.trained


def test_paused_job_goes_on(bench: Bench) -> None:
    job = bench.submit()
    bench.store.request(job, Action.pause, by="anna")
    bench.step()
    bench.store.request(job, Action.resume, by="anna")
    bench.step()
    assert bench.job(job).state == State.starting


def test_finished_job_is_extended_or_says_why_not(bench: Bench) -> None:
    job = bench.submit()
    bench.step()
    bench.world.end(job, _FINISHED)
    bench.step()
    asked = bench.store.request(job, Action.resume, by="anna", arguments={"epochs": 1})
    assert asked.wanted == State.queued
    bench.step()
    assert (bench.job(job).state, bench.job(job).wanted) == (State.finished, None)
    assert "adds nothing" in bench.store.events_after(0, job=job)[-1].data["text"]
    bench.store.request(job, Action.resume, by="anna", arguments={"epochs": 20})
    bench.step()
    assert (bench.job(job).state, bench.job(job).arguments) == ("starting", {"epochs": 20})


def test_cancel_that_comes_too_late_changes_nothing(bench: Bench) -> None:
    job = bench.submit()
    bench.step()
    bench.world.end(job, _FINISHED)
    running = bench.store.request(job, Action.cancel, by="anna")
    assert running.wanted == State.cancelled
    # The dispatcher saw the end before it saw the request.
    ledger = Ledger(bench.store)
    ledger.move(bench.job(job), State.running, None, "")
    ledger.move(bench.job(job), State.finished, "finished", "", placement={})
    bench.step()
    assert (bench.job(job).state, bench.job(job).wanted) == ("finished", None)


def test_publishing_twice_makes_one_version(bench: Bench) -> None:
    job = bench.submit()
    bench.step()
    bench.world.end(job, _FINISHED)
    bench.step()
    for _ in range(2):
        bench.store.request(job, Action.publish, by="anna", arguments={"model": "digits"})
        bench.step()
    assert bench.job(job).published == [{"model": "digits", "version": 1}]


def test_job_that_is_not_offered_any_more_is_its_users_to_change(bench: Bench) -> None:
    job = bench.submit(retries=5)
    bench.world.withdrawn.add(job)
    bench.step()
    failed = bench.job(job)
    assert (failed.state, failed.reason_code) == ("failed", "config")
    assert failed.reason == "data=ours: is not offered any more"


def test_mistake_of_ours_costs_one_job_and_no_other(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    bench.world.broken.add(first)
    bench.step(2)
    assert (bench.job(first).state, bench.job(first).reason_code) == ("failed", "internal")
    assert bench.job(first).reason == "RuntimeError: nobody thought of this"
    assert bench.job(second).state in ("starting", "running")


def test_request_at_which_we_make_a_mistake_keeps_no_other_from_being_done(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    bench.step(2)
    bench.world.end(first, _FINISHED)
    bench.step(2)
    bench.world.broken.add(first)
    bench.store.request(first, Action.resume, by="anna", arguments={"epochs": 20})
    bench.store.request(second, Action.cancel, by="anna")
    bench.step(2)
    assert bench.job(first).wanted is None
    assert bench.store.events_after(0, job=first)[-1].data["text"] == (
        "resume failed: RuntimeError: nobody thought of this"
    )
    assert bench.job(second).state in (State.stopping, State.cancelled)


def test_full_disk_lets_the_job_wait(bench: Bench) -> None:
    bench.world.full = True
    job = bench.submit()
    bench.step(2)
    assert bench.job(job).state == State.queued
    assert "No space left on device" in bench.job(job).reason
    bench.world.full = False
    bench.step(2)
    assert bench.job(job).state in (State.starting, State.running)


def test_start_that_is_carried_out_after_all_finds_that_its_time_is_over(bench: Bench) -> None:
    bench.world.faults["start"] = ["late"]
    job = bench.submit()
    bench.step(3)  # nothing is seen of it, and it is started anew
    assert bench.job(job).attempt == 2
    bench.world.deliver(0)
    assert bench.world.running == {job: 2}


def test_start_that_is_late_does_not_run_a_job_that_waits_again(bench: Bench) -> None:
    bench.world.faults["start"] = ["late"]
    job = bench.submit()
    bench.step(2)
    assert bench.job(job).state == State.queued
    bench.world.deliver(0)
    assert not bench.world.running


def test_new_dispatcher_takes_over_what_runs(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    bench.new()
    bench.step()
    assert (bench.job(job).state, bench.job(job).attempt) == ("running", 1)
    bench.world.end(job, _FINISHED)
    bench.new()
    bench.step()
    assert bench.job(job).state == State.finished


def test_what_an_attempt_left_is_not_taken_for_the_word_of_the_next(tmp_path: Path) -> None:
    for point in range(40):
        bench = Bench(tmp_path / str(point))
        job = bench.submit(retries=1)
        bench.step()
        bench.world.end(job, _FINISHED)
        bench.step()
        bench.store.request(job, Action.resume, by="anna", arguments={"epochs": 20})
        bench.world.killed_after = point
        try:
            bench.dispatcher.step()
        except Killed:
            bench.new()
        bench.world.killed_after = None
        bench.step(4)
        found = bench.job(job)
        assert (found.state, found.failures) == ("running", 0), f"killed at point {point}"
        assert bench.world.running == {job: found.attempt}
        bench.store.close()


def test_silent_job_is_killed(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    bench.clock.pass_by(901)
    bench.step(2)
    assert bench.job(job).state == State.lost


def test_clock_that_jumps_ends_nothing(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    bench.store.request(job, Action.cancel, by="anna")
    bench.step()
    bench.clock.jump(1e9)
    bench.step()
    assert bench.job(job).state == State.stopping
