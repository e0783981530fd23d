"""Jobs on a real Ray: they train, stop, and outlive whatever fails around them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn.jobs.states import Action, State
from tests.support.clusters import Place, place
from tests.support.ray_cluster import ADDRESS, RayCluster, ray_cluster, why_no_ray

_WHY_NOT = why_no_ray()
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]
_OPTIONS = ("--engine", "ray", "--ray-address", ADDRESS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as directory,
        ray_cluster(Path(directory)) as made,
    ):
        yield made


@pytest.fixture
def jobs(cluster: RayCluster, tmp_path: Path) -> Iterator[Place]:
    strange = tmp_path / "it's a $(strange) place 100%"
    strange.mkdir()
    with place(strange, *_OPTIONS, within=cluster.within) as made:
        yield made


def test_job_trains_and_finishes(jobs: Place, cluster: RayCluster) -> None:
    with jobs.dispatched():
        job = jobs.submit()
        done = jobs.wait_for(job, State.finished)
        assert done.handle == f"syncbn-{job}-1"
        other = jobs.endless()
        jobs.wait_for_epoch(other)
        # What is over is removed there, as Ray would keep it for ever.
        jobs.wait_until(other, lambda: len(_of_ray(jobs, cluster)) == 1)
        (known,) = _of_ray(jobs, cluster)
        assert known["submission_id"] == f"syncbn-{other}-1"
        jobs.ask(other, Action.cancel)
        jobs.wait_for(other, State.cancelled)
    assert jobs.console(job).startswith("=== attempt 1, ")
    config = jobs.workspace(job).run.read_config()
    assert (config.launch.threads, config.launch.nproc) == (1, 2)


def test_cancel_and_pause_write_the_state_first(jobs: Place) -> None:
    with jobs.dispatched():
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        jobs.ask(job, Action.pause)
        jobs.wait_for(job, State.paused)
        result = jobs.workspace(job).run.read_result()
        assert result is not None
        assert result.status == "interrupted"
        before = len(jobs.workspace(job).run.read_metrics())
        jobs.ask(job, Action.resume)
        jobs.wait_for_epoch(job, before + 1)
        jobs.ask(job, Action.cancel)
        jobs.wait_for(job, State.cancelled)
    epochs = [line["epoch"] for line in jobs.workspace(job).run.read_metrics()]
    assert epochs == [float(number + 1) for number in range(len(epochs))]


def test_job_that_no_machine_can_hold_waits_says_so_and_is_cancelled(jobs: Place) -> None:
    with jobs.dispatched():
        job = jobs.submit(cores=64)
        said = "it waits in the queue of ray: in vain: no machine has 64 CPUs"
        jobs.wait_until(job, lambda: jobs.job(job).reason == said)
        jobs.ask(job, Action.cancel)
        jobs.wait_for(job, State.cancelled)


def test_dispatcher_that_is_started_again_finds_its_jobs(jobs: Place) -> None:
    with jobs.dispatched():
        job = jobs.submit(epochs=8)
        jobs.wait_for_epoch(job)
    with jobs.dispatched():
        done = jobs.wait_for(job, State.finished)
    assert done.attempt == 1
    assert len(jobs.workspace(job).run.read_metrics()) == 8


def test_job_of_several_machines_has_one_torchrun_on_each(
    cluster: RayCluster, tmp_path: Path
) -> None:
    settings = "[cluster]\nranks_per_node = 1\n"
    with (
        place(tmp_path, *_OPTIONS, settings=settings, within=cluster.within) as jobs,
        jobs.dispatched(),
    ):
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        jobs.wait_for(job, State.running)
        jobs.ask(job, Action.pause)
        jobs.wait_for(job, State.paused)
        result = jobs.workspace(job).run.read_result()
        assert result is not None
        assert result.status == "interrupted"
        jobs.ask(job, Action.cancel)
        jobs.wait_for(job, State.cancelled)


def test_jobs_go_on_after_the_head_was_started_anew(jobs: Place, cluster: RayCluster) -> None:
    with jobs.dispatched():
        job = jobs.endless()
        jobs.wait_for_epoch(job)
        cluster.stop()
        jobs.wait_until(job, lambda: "Ray does not answer" in jobs.log.read_text())
        assert jobs.job(job).state == State.running
        cluster.start()
        jobs.wait_until(job, lambda: jobs.job(job).attempt == 2)
        before = len(jobs.workspace(job).run.read_metrics())
        jobs.wait_for_epoch(job, before + 1)
        jobs.ask(job, Action.cancel)
        jobs.wait_for(job, State.cancelled)
    # Whatever Ray killed, its processes wrote their state.
    (first, *_) = jobs.workspace(job).run.read_attempts()
    assert first.status == "interrupted"


def _of_ray(jobs: Place, cluster: RayCluster) -> list[Any]:
    """Return what Ray knows of the jobs of a store."""
    known = json.loads(cluster.ask("/api/jobs/") or "[]")
    ours = {"syncbn_store": str(jobs.directory)}
    return [each for each in known if (each["metadata"] or {}).items() >= ours.items()]
