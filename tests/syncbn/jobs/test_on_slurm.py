"""Jobs on a real Slurm: they train, stop, and outlive whatever fails around them."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn.jobs.engines.protocol import Presence
from syncbn.jobs.engines.slurm import SlurmEngine, SlurmOptions
from syncbn.jobs.states import Action, State
from tests.support.clusters import Place, place
from tests.support.jobs import children, wait_until
from tests.support.slurm import Slurm, slurm, why_no_slurm

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm()),
]

_SLEEP = ("--output=/dev/null", "--wrap=sleep 600")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, slurm(Path(directory)) as made:
        yield made


@pytest.fixture
def jobs(cluster: Slurm, tmp_path: Path) -> Iterator[Place]:
    strange = tmp_path / "it's a $(strange) place 100%"
    strange.mkdir()
    with place(strange, "--engine", "slurm", **cluster.variables) as made:
        yield made
        cluster.clear()


def test_job_trains_and_finishes(jobs: Place, cluster: Slurm) -> None:
    with jobs.dispatched():
        job = jobs.submit()
        done = jobs.wait_for(job, State.finished)
    states = [event.data["state"] for event in jobs.store.transitions(job)]
    assert states == ["submitted", "queued", "starting", "running", "finished"]
    assert done.handle.isdigit()
    assert jobs.console(job).startswith("=== attempt 1, ")
    assert (jobs.workspace(job).run.bundle_dir / "bundle.json").exists()
    assert not cluster.queue()


def test_job_waits_in_the_queue_and_says_why(jobs: Place, cluster: Slurm) -> None:
    full = cluster.ask("sbatch", "--parsable", "--nodes=2", "--exclusive", *_SLEEP)
    with jobs.dispatched():
        job = jobs.submit()
        jobs.wait_until(job, lambda: jobs.job(job).reason_code == "engine_queue")
        waiting = "it waits in the queue of slurm: for machines that are free"
        jobs.wait_until(job, lambda: jobs.job(job).reason == waiting)
        jobs.ask(job, Action.cancel)
        jobs.wait_for(job, State.cancelled)
        wait_until(lambda: len(cluster.queue()) == 1)
    cluster.ask("scancel", full.strip())


def test_sweep_is_an_array_of_which_each_task_goes_its_own_way(jobs: Place, cluster: Slurm) -> None:
    full = cluster.ask("sbatch", "--parsable", "--nodes=2", "--exclusive", *_SLEEP)
    with jobs.dispatched():
        waiting, running, killed = sweep = jobs.submit_sweep(epochs=10_000, **{"launch.nproc": 1})
        for job in sweep:
            jobs.wait_until(job, lambda job=job: jobs.job(job).reason_code == "engine_queue")
        array, _, task = jobs.job(waiting).handle.partition("_")
        assert task == "0"
        assert [jobs.job(job).handle for job in sweep] == [f"{array}_{task}" for task in range(3)]
        jobs.ask(waiting, Action.cancel)
        jobs.wait_for(waiting, State.cancelled)
        cluster.ask("scancel", full.strip())
        for job in (running, killed):
            jobs.wait_for_epoch(job)
            assert jobs.console(job).startswith("=== attempt 1, ")
    with jobs.dispatched():  # by another, which finds them
        jobs.ask(running, Action.pause)
        jobs.wait_for(running, State.paused)
        result = jobs.workspace(running).run.read_result()
        assert result is not None
        assert result.status == "interrupted"
        assert jobs.job(killed).state == State.running
        os.kill(_supervisor(jobs, killed), signal.SIGKILL)
        jobs.wait_for(killed, State.lost)
        jobs.ask(running, Action.resume)
        jobs.wait_until(running, lambda: jobs.job(running).attempt == 2)
        jobs.wait_for(running, State.running)
    assert jobs.console(waiting) == ""


def test_cancel_and_pause_write_the_state_first(jobs: Place) -> None:
    with jobs.dispatched():
        cancelled, paused = jobs.endless(), jobs.endless()
        for job, action, state in (
            (cancelled, Action.cancel, State.cancelled),
            (paused, Action.pause, State.paused),
        ):
            jobs.wait_for_epoch(job)
            jobs.ask(job, action)
            jobs.wait_for(job, state)
            result = jobs.workspace(job).run.read_result()
            assert result is not None
            assert result.status == "interrupted"
        before = len(jobs.workspace(paused).run.read_metrics())
        jobs.ask(paused, Action.resume)
        jobs.wait_for_epoch(paused, before + 1)
    epochs = [line["epoch"] for line in jobs.workspace(paused).run.read_metrics()]
    assert epochs == [float(number + 1) for number in range(len(epochs))]


def test_killed_supervisor_is_tried_again_and_goes_on(jobs: Place) -> None:
    with jobs.dispatched():
        job = jobs.endless(retries=1)
        jobs.wait_for_epoch(job)
        os.kill(_supervisor(jobs, job), signal.SIGKILL)
        jobs.wait_until(job, lambda: jobs.job(job).attempt == 2)
        jobs.wait_until(job, lambda: "=== attempt 2, " in jobs.console(job))
        jobs.wait_for(job, State.running)
        before = len(jobs.workspace(job).run.read_metrics())
        jobs.wait_for_epoch(job, before + 1)
        os.kill(_supervisor(jobs, job), signal.SIGKILL)
        assert jobs.wait_for(job, State.lost).reason_code == "killed"


def test_scancel_by_hand_writes_the_state_and_the_job_goes_on(jobs: Place, cluster: Slurm) -> None:
    with jobs.dispatched():
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        cluster.ask("scancel", jobs.job(job).handle)
        jobs.wait_until(job, lambda: jobs.job(job).attempt == 2)
        jobs.wait_for(job, State.running)
    (first, *_) = jobs.workspace(job).run.read_attempts()
    assert first.status == "interrupted"


def test_job_is_not_lost_while_the_controller_is_down(jobs: Place, cluster: Slurm) -> None:
    with jobs.dispatched():
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        cluster.stop_controller()
        try:
            jobs.wait_until(job, lambda: "does not answer" in jobs.log.read_text())
            before = len(jobs.workspace(job).run.read_metrics())
            jobs.wait_for_epoch(job, before + 2)
            assert jobs.job(job).state == State.running
            waiting = jobs.submit()
            jobs.wait_until(waiting, lambda: jobs.job(waiting).reason_code == "start_failed")
        finally:
            cluster.start_controller()
        jobs.wait_for(waiting, State.finished)
        assert (jobs.job(job).state, jobs.job(job).attempt) == (State.running, 1)


def test_requeued_job_goes_on_as_the_same_attempt(jobs: Place, cluster: Slurm) -> None:
    with jobs.dispatched():
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        number = jobs.job(job).handle
        cluster.ask("scontrol", "requeue", number)
        jobs.wait_until(job, lambda: jobs.job(job).reason_code == "engine_queue")
        before = len(jobs.workspace(job).run.read_metrics())
        # Slurm would let it wait for two minutes.
        cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
        jobs.wait_for_epoch(job, before + 1)
        jobs.wait_until(job, lambda: jobs.job(job).reason_code is None)
        assert (jobs.job(job).handle, jobs.job(job).attempt) == (number, 1)
    epochs = [line["epoch"] for line in jobs.workspace(job).run.read_metrics()]
    assert epochs == [float(number + 1) for number in range(len(epochs))]


def test_dispatcher_that_is_started_again_finds_its_jobs(jobs: Place) -> None:
    with jobs.dispatched():
        job = jobs.submit(epochs=8)
        jobs.wait_for_epoch(job)
    with jobs.dispatched():
        done = jobs.wait_for(job, State.finished)
    assert done.attempt == 1
    assert len(jobs.workspace(job).run.read_metrics()) == 8


def test_attempt_that_begins_late_leaves_everything_alone(jobs: Place, cluster: Slurm) -> None:
    with jobs.dispatched():
        job = jobs.submit()
        jobs.wait_for(job, State.finished)
    run = jobs.workspace(job).run
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}
    engine = SlurmEngine.of_machine(SlurmOptions(), cluster.environment)
    attempt = jobs.attempt(job)
    jobs.workspace(job).allow(attempt.number + 1)
    engine.start(attempt)
    assert engine.start(attempt) == cluster.queue()[0].partition("|")[0]  # which it is already
    wait_until(lambda: engine.observe([attempt])[job] == Presence.gone)
    assert "the time of this attempt is over" in jobs.console(job)
    assert before == {
        file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()
    }


def test_job_of_several_machines_has_one_torchrun_on_each(cluster: Slurm, tmp_path: Path) -> None:
    settings = "[cluster]\nranks_per_node = 1\n"
    with (
        place(tmp_path, "--engine", "slurm", settings=settings, **cluster.variables) as jobs,
        jobs.dispatched(),
    ):
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        machines = cluster.ask("squeue", "--noheader", f"--job={jobs.job(job).handle}", "-o", "%D")
        assert machines.strip() == "2"
        jobs.ask(job, Action.pause)
        jobs.wait_for(job, State.paused)
        result = jobs.workspace(job).run.read_result()
        assert result is not None
        assert result.status == "interrupted"


def _supervisor(jobs: Place, job: str) -> int:
    """Return the process that has started the others that hold a job's lock."""
    holders = set(jobs.workspace(job).holders())
    (found,) = [each for each in holders if holders & set(children(each))]
    return found
