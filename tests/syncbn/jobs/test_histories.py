"""Whatever happens, each job ends, along the arrows, and never with two supervisors."""

import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncbn.errors import JobActionError
from syncbn.jobs.dispatch.dispatcher import Dispatcher
from syncbn.jobs.dispatch.slots import Capacity
from syncbn.jobs.engines.protocol import Engine
from syncbn.jobs.engines.ray import RayEngine, RayOptions
from syncbn.jobs.engines.slurm import SlurmEngine, SlurmOptions
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import ACTIVE, ARROWS, ENDED, Action, State, allowed_actions
from syncbn.jobs.store.store import Store
from syncbn.train.run.directory import Result
from tests.support.fake_ray import FakeRay
from tests.support.fake_slurm import FakeSlurm
from tests.support.job_world import Clock, Killed, World, WorldEngine, new_dispatcher

# local: one as that of this machine. queue: one that decides itself when an attempt begins. The
# others are those of the product, on stand-ins for what they talk to.
_ENGINES = ("local", "queue", "slurm", "ray")
_CAPACITY = Capacity(cores=(0, 1, 2, 3), gpus=(0,))
_RESULTS: dict[str, Result | None] = {
    "finished": Result("finished", None, {}, 1, 0, objective=0.1, reason="finished"),
    "failed": Result("failed", "the loss is NaN", {}, 1, 1, reason="not_finite"),
    "crashed": Result("failed", "rank 1 was killed", {}, 1, 1, reason="rank_killed"),
    "interrupted": Result("interrupted", "stopped", {}, 1, 143, reason="stopped"),
    "silent": None,
}
_STEP = st.tuples(st.just("step"), st.none())
_KILLED_STEP = st.tuples(st.just("killed step"), st.integers(0, 40))
_SUBMIT = st.tuples(
    st.just("submit"),
    st.tuples(
        st.integers(1, 4),
        st.integers(0, 2),
        st.integers(-2, 2),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([1, 1, 3]),
    ),
)
_END = st.tuples(st.just("end"), st.tuples(st.integers(0, 5), st.sampled_from(sorted(_RESULTS))))
_CALLS = st.sampled_from(["start", "start", "observe", "stop", "kill"])
_FAULTS = st.sampled_from(["lost", "late", "slow", "repeated"])
# What is named several times happens so much more often.
_HAPPENS = st.one_of(
    *(_STEP, _STEP, _STEP, _KILLED_STEP, _KILLED_STEP, _SUBMIT, _SUBMIT, _END),
    st.tuples(st.just("ask"), st.tuples(st.integers(0, 5), st.sampled_from(list(Action)))),
    st.tuples(st.just("heed"), st.integers(0, 5)),
    st.tuples(st.just("deliver"), st.integers(0, 5)),
    st.tuples(st.just("requeue"), st.integers(0, 5)),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("fault"), st.tuples(_CALLS, _FAULTS)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 6.0, 61.0, 1000.0])),
    st.tuples(st.just("jump"), st.sampled_from([-1e6, -10.0, 1e6])),
    st.tuples(st.just("full"), st.sampled_from([True, False, False])),
)
# Left to itself, hypothesis makes short lists, in which little comes together.
_HISTORIES = st.lists(_HAPPENS, min_size=40, max_size=80)


class History:
    """One sequence of what happens, and what must hold after each of it."""

    def __init__(self, directory: Path, engine: str) -> None:
        self.clock = Clock()
        self.world = World()
        self.store = Store(directory, lambda: self.clock.wall)
        self.engine = engine
        self.slurm = FakeSlurm(self.world)
        self.ray = FakeRay(self.world)
        self.jobs: list[str] = []
        self.dispatcher = self._new()

    def _new(self) -> Dispatcher:
        return new_dispatcher(
            self.store,
            self.world,
            self.clock,
            capacity=_CAPACITY,
            engine=self._engine(),
        )

    def _engine(self) -> Engine:
        if self.engine == "slurm":
            return SlurmEngine(SlurmOptions(), self.slurm, lambda: self.clock.steady, poll_s=0)
        if self.engine == "ray":
            options = RayOptions(Path("/jobs"), {})
            return RayEngine(options, self.ray, lambda: self.clock.steady, poll_s=0)
        return WorldEngine(self.world, has_own_queue=self.engine == "queue")

    def happen(self, what: str, how: Any) -> None:
        if what == "step":
            self.step(None)
        elif what == "killed step":
            self.step(how)
        elif what == "submit":
            cores, retries, priority, is_valid, count = how
            spec = JobSpec(name="job", cores=cores, retries=retries, priority=priority)
            name = None if count == 1 else "sweep"
            jobs = self.store.submit([spec] * count, owner="anna", sweep_name=name)
            self.jobs += [job.id for job in jobs]
            if not is_valid:
                self.world.invalid.add(jobs[0].id)
        elif what == "ask" and self.jobs:
            index, action = how
            with suppress(JobActionError):
                arguments = {"epochs": index} if action == Action.resume else {}
                job = self.jobs[index % len(self.jobs)]
                self.store.request(job, action, by="anna", arguments=arguments)
        elif what == "end" and self.world.running:
            index, how_it_ends = how
            job = sorted(self.world.running)[index % len(self.world.running)]
            self.world.end(job, _RESULTS[how_it_ends])
        elif what == "heed" and self.world.running:
            self.world.heed(sorted(self.world.running)[how % len(self.world.running)])
        elif what == "requeue" and self.world.running and self.engine == "slurm":
            job = sorted(self.world.running)[how % len(self.world.running)]
            self.world.starts.append((job, self.world.running[job]))
            self.world.end(job, None)
        elif what == "restart" and self.engine == "ray":
            self.ray.restart()
        elif what == "deliver" and self.world.starts:
            self.world.deliver(how % len(self.world.starts))
        elif what == "fault":
            call, fault = how
            self.world.faults.setdefault(call, []).append(fault)
        elif what == "wait":
            self.clock.pass_by(how)
        elif what == "jump":
            self.clock.jump(how)
        elif what == "full":
            self.world.full = how
        self.check()

    def step(self, killed_after: int | None) -> None:
        self.world.killed_after = killed_after
        try:
            self.dispatcher.step()
        except Killed:
            self.dispatcher = self._new()
        self.world.killed_after = None

    def check(self) -> None:
        cores: list[int] = []
        gpus: list[int] = []
        for job in map(self.store.get, self.jobs):
            if job.id in self.world.running:
                assert job.state in ACTIVE, f"{job.state} with a supervisor"
                assert job.attempt == self.world.running[job.id]
            if job.state in ACTIVE:
                cores += job.placement["cores"]
                gpus += job.placement["gpus"]
            else:
                assert not job.placement
            if job.state == State.finished:
                assert (job.id, job.attempt) in self.world.trained, "by an attempt before"
        assert len(set(cores)) == len(cores)
        assert len(set(gpus)) == len(gpus)

    def come_to_an_end(self) -> None:
        """Let everything work, and every supervisor finish."""
        self.world.faults.clear()
        self.world.full = False
        for _ in range(40 + 20 * len(self.jobs)):
            self.step(None)
            self.check()
            self.clock.pass_by(6)
            while self.world.starts:
                self.world.deliver(0)
            for job in sorted(self.world.running):
                self.world.heed(job)
            for job in sorted(self.world.running):
                self.world.end(job, _RESULTS["finished"])
            for job in map(self.store.get, self.jobs):
                if job.state == State.paused:
                    with suppress(JobActionError):
                        self.store.request(job.id, Action.resume, by="anna")
            states = {self.store.get(job).state for job in self.jobs}
            if states <= ENDED and not self._asked():
                return
        pytest.fail(f"some jobs never ended: {[self.store.get(job) for job in self.jobs]}")

    def _asked(self) -> int:
        with self.store.database.reading() as connection:
            return connection.execute("SELECT COUNT(*) FROM requests").fetchone()[0]

    def check_events(self) -> None:
        """Each job went along the arrows, and its events tell where it is."""
        for job in map(self.store.get, self.jobs):
            states = [State(event.data["state"]) for event in self.store.transitions(job.id)]
            assert states[0] == State.submitted
            for before, after in pairwise(states):
                assert after in ARROWS[before], f"{before} → {after}"
            assert states[-1] == job.state
            assert job.wanted is None
            assert job.archived or allowed_actions(job.state)


def _live(happens: list[tuple[str, Any]], engine: str) -> None:
    with tempfile.TemporaryDirectory(dir=_fast()) as directory:
        history = History(Path(directory), engine)
        try:
            for what, how in happens:
                history.happen(what, how)
            history.come_to_an_end()
            history.check_events()
        finally:
            history.store.close()


def _fast() -> str | None:
    """Return a directory in memory, where a write to disk costs nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


_SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@_SETTINGS
@given(_HISTORIES, st.sampled_from(_ENGINES))
def test_every_job_ends_whatever_happens(happens: list[tuple[str, Any]], engine: str) -> None:
    _live(happens, engine)


@pytest.mark.long
@pytest.mark.parametrize("engine", _ENGINES)
@settings(_SETTINGS, max_examples=1250)
@given(happens=_HISTORIES)
def test_every_job_ends_in_thousands_of_histories(
    engine: str, happens: list[tuple[str, Any]]
) -> None:
    _live(happens, engine)
