"""One job in a directory at a time, whatever ends its processes."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from syncbn.errors import ConfigError
from syncbn.train.changes import compose_job
from syncbn.train.run.comparison import find_runs
from syncbn.train.run.directory import open_run
from tests.support.jobs import Job, is_alive, wait_until
from tests.support.processes import TRAIN, run

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def job(tmp_path: Path) -> Generator[Job]:
    """A job that has made its first steps and would make many more."""
    job = Job(tmp_path / "run", "epochs=200", "log_every_steps=1", "data.workers=1")
    try:
        wait_until(job.run.steps_file.exists)
        yield job
    finally:
        job.kill_all()


def _try(job: Job, *overrides: str) -> None:
    """Do what a launcher does before it starts anything."""
    typed = [*overrides, f"run_dir={job.run.path}"]
    open_run(compose_job(typed), typed).lock.close()


def _status(job: Job) -> str:
    (found,) = find_runs([job.run.path])
    return found.status


def test_second_launcher_leaves_a_running_run_alone(job: Job, tmp_path: Path) -> None:
    config = job.run.config_file.read_bytes()
    second = run([*TRAIN, f"run_dir={job.run.path}", "epochs=201"], tmp_path)
    assert (second.returncode, second.stdout.count("another job is training in")) == (2, 1)
    assert job.run.config_file.read_bytes() == config
    assert _status(job) == "running"
    assert job.run.read_result() is None
    job.lose_launcher()
    assert job.wait() == 128 + signal.SIGTERM
    assert _status(job) == "interrupted"
    _try(job)


def test_directory_is_free_at_once_when_all_are_killed(job: Job) -> None:
    ranks = job.ranks()
    job.kill_all()
    _try(job)
    assert not any(is_alive(rank) for rank in ranks)


def test_directory_is_free_at_once_when_the_supervisor_is_killed(job: Job) -> None:
    ranks = job.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # not even one that cannot act outlives it
    os.kill(job.supervisor.pid, signal.SIGKILL)
    _try(job)
    wait_until(lambda: not any(is_alive(rank) for rank in ranks))


def test_directory_is_not_free_while_the_ranks_of_a_lost_launcher_write_their_state(
    job: Job,
) -> None:
    ranks = job.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # the others wait for it
    job.lose_launcher()
    with pytest.raises(ConfigError, match="another job is training in"):
        _try(job)
    assert _status(job) == "running"
    os.kill(ranks[1], signal.SIGCONT)
    assert job.wait() == 128 + signal.SIGTERM
    _try(job)
