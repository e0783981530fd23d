"""What ends a run before its time, and how it goes on."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from syncbn.train.run.checkpoint import checkpoint_files, read_newest
from tests.support.jobs import Job, is_alive, outcome, wait_until, whole_outcome

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

SHORT = ("epochs=3", "log_every_steps=1", "checkpoint.every_steps=4", "optim.accumulate=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job comes to if nobody stops it."""
    return whole_outcome(tmp_path_factory.mktemp("whole") / "run", *SHORT)


def test_rank_that_is_killed_is_started_again_and_ends_bit_identical(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path / "restarted", *SHORT, "launch.max_restarts=2")
    for step in (5, 20):
        wait_until(lambda step=step: len(_lines(job)) >= step)
        os.kill(job.ranks()[step % 2], signal.SIGKILL)
    assert job.wait() == 0
    assert outcome(job.run) == whole
    assert job.run.log_file.read_text().count("resuming in epoch") == 2


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "supervisor"),
        pytest.param(signal.SIGTERM, "a rank", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "a rank", marks=pytest.mark.long),
    ],
)
def test_run_told_to_stop_writes_its_state_and_goes_on_bit_identical(
    whole: dict[str, Any], tmp_path: Path, number: signal.Signals, to: str
) -> None:
    job = Job(tmp_path / "stopped", *SHORT)
    wait_until(lambda: len(_lines(job)) >= 10)
    os.kill(job.supervisor.pid if to == "supervisor" else job.ranks()[1], number)
    assert job.wait(20) == 128 + number
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.exit_code) == ("interrupted", 128 + number)
    assert result.error == f"stopped by {number.name} after step {len(_lines(job))}"
    assert whole_outcome(tmp_path / "stopped", *SHORT) == whole


def test_ranks_end_with_a_checkpoint_when_the_launcher_is_gone(tmp_path: Path) -> None:
    job = Job(tmp_path / "orphan", "epochs=200", "log_every_steps=1")
    wait_until(lambda: len(_lines(job)) >= 10)
    ranks = job.ranks()
    job.lose_launcher()
    job.supervisor.join(20)
    assert job.supervisor.exitcode == 128 + signal.SIGTERM
    assert not any(is_alive(rank) for rank in ranks)
    assert checkpoint_files(job.run.checkpoints_dir)


def test_run_of_a_killed_supervisor_goes_on_bit_identical(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path / "killed", *SHORT)
    wait_until(lambda: len(_lines(job)) >= 10)
    ranks = job.ranks()
    os.kill(job.supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(rank) for rank in ranks), 20)
    job.kill_all()
    assert job.run.read_result() is None
    assert whole_outcome(tmp_path / "killed", *SHORT) == whole


def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path / "damaged", *SHORT, "checkpoint.keep=3")
    wait_until(lambda: len(checkpoint_files(job.run.checkpoints_dir)) >= 2)
    job.kill_all()
    newest = checkpoint_files(job.run.checkpoints_dir)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = whole_outcome(tmp_path / "damaged", *SHORT, "checkpoint.keep=3")
    assert resumed == whole
    assert f"{newest} is damaged" in job.run.log_file.read_text()


def test_other_number_of_ranks_resumes_and_says_what_differs(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "epochs=3", "log_every_steps=1", "launch.nproc=2")
    wait_until(lambda: len(_lines(job)) >= 60)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    job.wait()
    position = read_newest(job.run.checkpoints_dir)
    assert position is not None
    job = Job(tmp_path / "run", "epochs=3", "log_every_steps=1", "launch.nproc=3")
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    log = job.run.log_file.read_text()
    assert "3 ranks go on with what 2 have trained" in log
    lines = job.run.read_metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-3  # of the last step, after which it would be 0
    assert lines[-1]["val_accuracy"] > 0.5


def _lines(job: Job) -> list[str]:
    return job.run.steps_file.read_text().splitlines() if job.run.steps_file.exists() else []


class _Sleeping(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 10 and dist.get_rank() == 1:
            time.sleep(1000)
        return self.layers(x)


def make_sleeping(in_channels: int, num_classes: int) -> nn.Module:
    return _Sleeping(in_channels, num_classes)


@pytest.mark.parametrize("kind", [pytest.param("sleeping", marks=pytest.mark.long), "stopped"])
def test_rank_that_hangs_ends_the_job_within_the_time_out_and_is_named(
    tmp_path: Path, kind: str
) -> None:
    overrides = ["epochs=2000", "log_every_steps=1", "launch.timeout_s=3"]
    if kind == "sleeping":
        overrides += ["norm=none", "model=custom", f"model.factory={__name__}:make_sleeping"]
    job = Job(tmp_path / "hanging", *overrides)
    wait_until(lambda: len(_lines(job)) >= 5)
    hanging = job.ranks()[1]
    if kind == "stopped":
        os.kill(hanging, signal.SIGSTOP)
    started = time.monotonic()
    assert job.wait(60) == 1
    # Without its own end it would last 30 s longer, until the supervisor kills what does not stop.
    assert time.monotonic() - started < 30
    assert not is_alive(hanging)
    output = Path(f"{job.run.path}.out").read_text()
    result = job.run.read_result()
    assert result is not None
    assert result.reason == "rank_hung"
    if kind == "stopped":
        assert "rank 1 is gone or stopped; it was last at step" in str(result.error)
    else:
        # Of itself, or because the others asked.
        assert re.search("rank 1 hangs[:,] in forward and backward", output)
        assert 'test_resume.py", line' in output
        assert "in forward" in output


def test_image_that_one_rank_cannot_read_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            # Of many images, only some are looked at before training.
            for number in range(50):
                file = tmp_path / "images" / split / label / f"{number:02}.png"
                Image.new("RGB", (8, 8), (5 * number, 0, 0)).save(file)
    broken = tmp_path / "images" / "train" / "b" / "05.png"
    broken.write_bytes(broken.read_bytes()[:40])
    overrides = ["data=folder", f"data.path={tmp_path / 'images'}", "data.size=8"]
    started = time.monotonic()
    job = Job(tmp_path / "run", *overrides, "data.workers=1", "data.batch_size=2")
    assert job.wait() == 1
    assert time.monotonic() - started < 30
    result = job.run.read_result()
    assert result is not None
    assert f"cannot read the image {broken}" in str(result.error)
    assert result.reason == "data"
