"""What a run that is there goes on with: more epochs, another rate, or what it has itself."""

import os
import signal
from pathlib import Path

import pytest

from syncbn.bundle import read_bundle
from syncbn.train.changes import compose_job
from syncbn.train.run.directory import RunDirectory, open_run
from tests.support.jobs import Job, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


class _Again(Job):
    """A job of which nothing is typed but its directory, and what is given."""

    small = ()


def _epochs(run: RunDirectory) -> list[int]:
    return [int(line["epoch"]) for line in run.read_metrics()]


def test_finished_run_is_extended_and_published_again(tmp_path: Path) -> None:
    models = tmp_path / "models"
    first = Job(tmp_path / "run", "epochs=2", f"publish={models}")
    assert first.wait() == 0, Path(f"{first.run.path}.out").read_text()
    bundle = (first.run.bundle_dir / "model.safetensors").read_bytes()
    more = _Again(tmp_path / "run", "epochs=4", "optim.lr=0.05")
    assert more.wait() == 0, Path(f"{first.run.path}.out").read_text()
    assert _epochs(more.run) == [1, 2, 3, 4]
    result = more.run.read_result()
    assert result is not None
    assert result.status == "finished"
    assert (more.run.bundle_dir / "model.safetensors").read_bytes() != bundle
    for version in ("1", "2"):
        assert read_bundle(models / "digits-cnn" / version)
    log = more.run.log_file.read_text()
    assert "INFO going on with optim.lr=0.05 (was 0.1), epochs=4 (was 2)" in log or (
        "INFO going on with epochs=4 (was 2), optim.lr=0.05 (was 0.1)" in log
    )
    assert log.count("resuming in epoch 3 after step") == 1
    rates = [line["lr"] for line in more.run.read_metrics()]
    assert 0 < rates[3] < rates[2] < 0.05 < rates[0]


def test_directory_alone_resumes_what_was_stopped(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "epochs=40", "log_every_steps=1", "norm=local", "data.workers=1")
    wait_until(job.run.steps_file.exists)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    before = job.run.read_config()
    again = _Again(tmp_path / "run")
    wait_until(lambda: "resuming in epoch" in again.run.log_file.read_text())
    again.lose_launcher()
    again.wait()
    assert again.run.read_config() == before
    fewer = [f"run_dir={tmp_path / 'run'}", "epochs=1", "data.workers=0", "checkpoint.keep=1"]
    with open_run(compose_job(fewer), fewer) as opened:
        assert opened.config.norm.name == "local"
        assert len(opened.changes) == 3
