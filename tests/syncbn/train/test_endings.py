"""How an attempt ended, as a program reads it: reasons, times, and the attempts before it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.errors import ReplicaError
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.run.status import Phase
from tests.support.jobs import Job, wait_until

HERE = "tests.syncbn.train.test_endings"
SHORT = ("model=custom", f"model.factory={HERE}:make", "norm=none", "log_every_steps=1", "epochs=2")


class _Failing(nn.Module):
    """A model that fails in one of many ways, in the second epoch and on rank 1."""

    def __init__(self, in_channels: int, num_classes: int, fails: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
        self._fails = fails
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += self.training
        if self._calls == 60 and self._fails == "cut":  # what torch says of it, on all ranks
            raise RuntimeError("[gloo/transport/tcp] Timed out waiting 8000ms for recv operation")
        if self._calls == 60 and self._fails == "late":  # what our sums in shared memory say
            raise ReplicaError("rank 1 did not come within the group's time-out of 8 s")
        if self._calls == 60 and dist.get_rank() == 1:
            match self._fails:
                case "error":
                    raise ValueError("No space left on device")  # of which only the type counts
                case "memory":
                    raise MemoryError("too large")
                case "exit":
                    sys.exit(3)
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case _:
                    pass
        return self.layers(x)


def make(in_channels: int, num_classes: int, fails: str) -> nn.Module:
    """Return a model that fails in a way."""
    return _Failing(in_channels, num_classes, fails)


def _result(run: RunDirectory) -> Result:
    result = run.read_result()
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("fails", "reason", "error"),
    [
        ("error", "rank_failed", "rank 1 failed: ValueError: No space left on device"),
        ("memory", "out_of_memory", "rank 1 failed: MemoryError: too large"),
        ("exit", "rank_failed", "rank 1 ended with exit code 3"),
        ("killed", "rank_killed", "rank 1 was killed by SIGKILL"),
        ("cut", "rank_hung", "rank 0 got no answer within launch.timeout_s=120, though no rank"),
        ("late", "rank_hung", "rank 0 got no answer within launch.timeout_s=120, though no rank"),
    ],
)
def test_failure_of_any_rank_says_its_reason(
    tmp_path: Path, fails: str, reason: str, error: str
) -> None:
    before = time.time()
    job = Job(tmp_path / "run", *SHORT, f"+model.arguments.fails={fails}")
    assert job.wait() == 1
    result = _result(job.run)
    assert (result.status, result.reason) == ("failed", reason)
    assert error in str(result.error)
    assert result.metrics["epoch"] == 1
    assert result.started is not None
    assert result.ended is not None
    assert before <= result.started < result.ended <= time.time()
    assert result.duration_s == result.ended - result.started


@pytest.mark.parametrize(
    ("overrides", "code", "reason"),
    [
        (("optim.lr=1e+20", "schedule=constant"), 1, "not_finite"),
        (("data=folder", "data.path=nowhere"), 2, "config"),
    ],
)
def test_failure_of_all_ranks_says_its_reason(
    tmp_path: Path, overrides: tuple[str, ...], code: int, reason: str
) -> None:
    job = Job(tmp_path / "run", *overrides, "launch.nproc=1")
    assert job.wait() == code
    assert _result(job.run).reason == reason


def test_job_tells_its_phases_and_leaves_its_attempts(tmp_path: Path) -> None:
    what = (tmp_path / "run", *SHORT, "+model.arguments.fails=no")
    job = Job(*what)
    wait_until(lambda: (status := job.run.read_status()) is not None and status["step"] > 0)
    status = job.run.read_status()
    assert status is not None
    assert status["phase"] in ("training", "evaluating")
    assert (status["attempt"], status["epochs"]) == (1, 2)
    assert 0 < status["step"] <= status["total_steps"]
    assert 0 < status["epoch"] <= 2
    job.kill_all()
    job = Job(*what)
    wait_until(lambda: (status := job.run.read_status()) is not None and status["step"] > 0)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    job = Job(*what)
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    attempts = job.run.read_attempts()
    assert [(each.attempt, each.status, each.reason) for each in attempts] == [
        (1, "lost", "killed"),
        (2, "interrupted", "stopped"),
        (3, "finished", "finished"),
    ]
    times = [when for each in attempts for when in (each.started, each.ended)]
    assert times == sorted(times, key=lambda when: when or 0)
    status = job.run.read_status()
    assert status is not None
    assert (status["attempt"], status["phase"]) == (3, Phase.DONE)
    assert status["step"] == status["total_steps"] == job.run.read_metrics()[-1]["step"]
    lines = job.run.read_metrics()
    assert times[0] is not None
    assert times[0] < lines[0]["time"] < lines[1]["time"] < time.time()
