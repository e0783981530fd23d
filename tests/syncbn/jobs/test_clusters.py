"""What becomes of jobs where the engine has a queue of its own, and does as it likes with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn.jobs.dispatch.dispatcher import Dispatcher
from syncbn.jobs.dispatch.slots import Capacity
from syncbn.jobs.engines.ray import RayEngine, RayOptions
from syncbn.jobs.engines.slurm import SlurmEngine, SlurmOptions
from syncbn.jobs.job import DispatcherInfo, Job
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import Action, State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.train.run.directory import Result
from tests.support.fake_ray import FakeRay
from tests.support.fake_slurm import FakeSlurm
from tests.support.job_world import Clock, World, new_dispatcher

_FINISHED = Result("finished", None, {}, 1, 0, objective=0.25, reason="finished")


class Bench:
    """A store, a world, and a dispatcher for a cluster of Slurm or Ray."""

    def __init__(self, directory: Path) -> None:
        self.clock, self.world = Clock(), World()
        self.store = Store(directory, lambda: self.clock.wall)
        self.slurm, self.ray = FakeSlurm(self.world), FakeRay(self.world)
        self.on_slurm()

    def on_slurm(self, capacity: Capacity | None = None) -> None:
        engine = SlurmEngine(SlurmOptions(), self.slurm, lambda: self.clock.steady)
        self.dispatcher = self._new(engine, capacity)

    def on_ray(self) -> None:
        options = RayOptions(Path("/jobs"), {})
        engine = RayEngine(options, self.ray, lambda: self.clock.steady)
        self.dispatcher = self._new(engine, None)

    def _new(self, engine: SlurmEngine | RayEngine, capacity: Capacity | None) -> Dispatcher:
        return new_dispatcher(
            self.store, self.world, self.clock, capacity=capacity or Capacity(()), engine=engine
        )

    def submit(self, cores: int = 2, nproc: int = 2) -> str:
        spec = JobSpec(name="job", cores=cores, nproc=nproc)
        return self.store.submit([spec], owner="anna")[0].id

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.dispatcher.step()
            self.clock.pass_by(6)

    def job(self, job: str) -> Job:
        return self.store.get(job)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def test_all_jobs_are_handed_over_at_once(bench: Bench) -> None:
    jobs = [bench.submit(cores=64) for _ in range(5)]
    bench.step(2)
    assert {bench.job(job).state for job in jobs} == {State.running}


def test_cores_may_be_limited_on_a_cluster_too(bench: Bench) -> None:
    bench.on_slurm(Capacity((0, 1, 2)))
    first, second, third = bench.submit(), bench.submit(), bench.submit(cores=4)
    bench.step(2)
    assert [bench.job(job).state for job in (first, second)] == [State.running, State.queued]
    assert bench.job(third).reason_code == "too_large"
    bench.world.end(first, _FINISHED)
    bench.step(2)
    assert bench.job(second).state in (State.starting, State.running)


def test_jobs_get_gpus_by_themselves_if_the_dispatcher_says_that_there_are_some(
    bench: Bench,
) -> None:
    bench.on_slurm(Capacity((), (0, 1)))
    pair, four = bench.submit(), bench.submit(nproc=4)
    bench.step()
    assert (bench.job(pair).device, bench.job(pair).gpus) == ("cuda", 2)
    assert (bench.job(four).device, bench.job(four).gpus) == ("cpu", 0)
    assert any("--gres=gpu:2" in command for command in bench.slurm.commands)


def test_queued_job_waits_for_the_cluster_to_take_it(bench: Bench) -> None:
    _, job = bench.submit(), bench.submit()
    bench.world.faults["start"] = ["lost"]
    bench.step()
    about = DispatcherInfo(1, "here", "slurm", 0, 0, 0, 0, 0.0, bench.clock.wall)
    Ledger(bench.store).say_alive(about)
    assert bench.job(job).waiting_for == "slurm to take it; first in line"


def test_job_in_the_queue_says_what_for_and_forgets_it_once_it_runs(bench: Bench) -> None:
    bench.world.faults["start"] = ["slow"]
    job = bench.submit()
    bench.step(2)
    assert bench.job(job).state == State.starting
    assert bench.job(job).reason == "it waits in the queue of slurm: for machines that are free"
    bench.world.deliver(0)
    bench.step()
    assert (bench.job(job).state, bench.job(job).reason) == (State.running, "")


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_job_that_has_not_begun_is_cancelled_at_once_and_begins_in_vain(
    bench: Bench, engine: str
) -> None:
    if engine == "ray":
        bench.on_ray()
    bench.world.faults["start"] = ["slow"]
    job = bench.submit()
    bench.step(2)
    bench.store.request(job, Action.cancel, by="anna")
    bench.step()
    assert bench.job(job).state == State.cancelled
    # Ray cannot be told to forget what has not begun; Slurm can.
    assert len(bench.world.starts) == (1 if engine == "ray" else 0)
    while bench.world.starts:
        bench.world.deliver(0)
    assert not bench.world.running


def test_requeued_job_that_waits_for_long_is_the_same_attempt_and_not_silent(
    bench: Bench,
) -> None:
    job = bench.submit()
    bench.step(2)
    bench.world.end(job, None)
    bench.world.starts.append((job, 1))
    bench.step()
    assert bench.job(job).reason_code == "engine_queue"
    bench.clock.pass_by(10_000)
    bench.step()
    bench.world.deliver(0)
    bench.step(3)
    assert (bench.job(job).state, bench.job(job).attempt) == (State.running, 1)
    assert bench.job(job).reason_code is None


def test_cluster_that_does_not_answer_loses_nothing_and_gets_no_more_jobs(bench: Bench) -> None:
    running = bench.submit()
    bench.step(2)
    bench.world.faults["observe"] = ["lost"] * 3
    waiting = [bench.submit() for _ in range(3)]
    bench.step()
    assert bench.job(running).state == State.running
    assert [bench.job(job).state for job in waiting] == ["starting", "queued", "queued"]
    bench.step(6)
    assert {bench.job(job).state for job in (running, *waiting)} == {State.running}


def test_job_that_ray_gave_up_before_it_began_is_tried_again(bench: Bench) -> None:
    bench.on_ray()
    bench.world.faults["start"] = ["slow"]
    job = bench.submit()
    bench.step(2)
    bench.ray.give_up(f"syncbn-{job}-1")
    bench.step(2)
    assert bench.job(job).reason_code == "not_started"
    assert "failed to start within 900" in bench.job(job).reason
    bench.step(2)
    assert (bench.job(job).state, bench.job(job).attempt) == (State.running, 2)


def test_lost_job_says_what_the_cluster_says(bench: Bench) -> None:
    bench.on_ray()
    job = bench.submit()
    bench.step(2)
    bench.ray.restart()
    bench.step(3)
    assert bench.job(job).state == State.lost
    assert "its head may have been started anew" in bench.job(job).reason


def test_job_that_cannot_be_killed_is_not_killed_with_every_look(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit()
    bench.step(2)
    monkeypatch.setattr(bench.world, "end", lambda job, result: None)  # its machine is gone
    bench.clock.pass_by(1000)
    for _ in range(10):
        bench.dispatcher.step()
        bench.clock.pass_by(0.3)
    kills = [each for each in bench.slurm.commands if "--signal=KILL" in each]
    assert len(kills) == 2


def test_word_of_another_machine_may_come_a_little_later(bench: Bench) -> None:
    job = bench.submit()
    bench.step(2)
    bench.world.end(job, None)
    bench.step()
    bench.world.results[job] = _FINISHED
    bench.step()
    assert bench.job(job).state == State.finished
