"""A job's supervisor: what it does when a rank ends, and when it is told to stop."""

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from syncbn.train import export
from syncbn.train.changes import compose_job
from syncbn.train.config import compose_config
from syncbn.train.launch import ranks, supervisor
from syncbn.train.launch.ranks import End
from syncbn.train.run.directory import Result, RunDirectory, open_run
from tests.support.jobs import SMALL, Job, outcome, wait_until, whole_outcome
from tests.support.world import CONTEXT

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

SHORT = ("epochs=2", "log_every_steps=1", "checkpoint.every_steps=4")
TINY = (
    *("data=synthetic", "data.samples=16", "data.test_samples=4", "data.size=8"),
    "max_steps=1",
)


def _output(job: Job) -> str:
    return Path(f"{job.run.path}.out").read_text()


def _steps(run: RunDirectory) -> int:
    return run.steps_file.read_text().count("\n") if run.steps_file.exists() else 0


def test_killed_rank_is_the_end_of_the_others_at_once_and_is_named_once(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "epochs=500", "log_every_steps=1", "launch.stop_timeout_s=600")
    wait_until(lambda: _steps(job.run) > 2)
    first, second = job.ranks()
    os.kill(first, signal.SIGSTOP)  # which would keep everybody waiting who asks it to end
    os.kill(second, signal.SIGKILL)
    assert job.wait() == 1
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "rank_killed")
    assert result.error == "rank 1 was killed by SIGKILL"
    assert _output(job).count("SIGKILL") == 1


def test_stopped_first_rank_is_ended_by_another_which_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "epochs=500", "log_every_steps=1", "launch.timeout_s=5")
    wait_until(lambda: _steps(job.run) > 2)
    os.kill(job.ranks()[0], signal.SIGSTOP)  # so that it cannot write the result itself
    assert job.wait() == 1
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "rank_hung")
    assert "rank 0 is gone or stopped; it was last at step" in str(result.error)


def make_stopped_at_the_end(in_channels: int, num_classes: int) -> nn.Module:
    """Return a model, and stop the first rank when it writes the bundle."""

    def write(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    export.write_bundle = write
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def test_rank_that_does_not_end_after_the_others_is_ended(tmp_path: Path) -> None:
    factory = f"model.factory={__name__}:make_stopped_at_the_end"
    model = ("norm=none", "model=custom", factory)
    job = Job(tmp_path / "run", *TINY, *model, "launch.nproc=2", "launch.timeout_s=2")
    assert job.wait() == 1
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "rank_hung")
    assert result.error == "rank 0 did not end within 9 s of the others, and was killed"


def test_ranks_are_started_again_as_often_as_is_allowed(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "epochs=500", "log_every_steps=1", "launch.max_restarts=1")
    for attempt in (1, 2):
        wait_until(lambda attempt=attempt: _log(job).count("ranks on") == attempt)
        os.kill(job.ranks()[0], signal.SIGKILL)
    assert job.wait() == 1
    said = [line for line in _output(job).splitlines() if line.startswith("syncbn-train: ")]
    assert said == [
        "syncbn-train: rank 0 was killed by SIGKILL; all ranks start again (1 of 1)",
        "syncbn-train: rank 0 was killed by SIGKILL",
    ]
    status = job.run.read_status()
    assert status is not None
    assert (status["restarts"], status["attempt"]) == (1, 1)


def _log(job: Job) -> str:
    return job.run.log_file.read_text() if job.run.log_file.exists() else ""


def make_ending(in_channels: int, num_classes: int, how: str) -> nn.Module:
    """Return no model, and end in another way than by returning one."""
    if how == "exits":
        sys.exit(3)
    if how == "leaves":
        os._exit(0)
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ("exits", "rank 0 ended with exit code 3", "rank_failed"),
        ("leaves", "rank 0 ended with exit code 0", "rank_failed"),
    ],
)
def test_rank_that_ends_without_a_word_has_failed(
    tmp_path: Path, how: str, error: str, reason: str
) -> None:
    factory = f"model.factory={__name__}:make_ending"
    model = ("norm=none", "model=custom", factory, f"+model.arguments.how={how}")
    job = Job(tmp_path / "run", *TINY, *model, "launch.nproc=1")
    assert job.wait() == 1
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.error, result.reason) == ("failed", error, reason)


def test_ranks_that_fail_alike_are_not_started_again(tmp_path: Path) -> None:
    overrides = ("launch.max_restarts=3", "optim.lr=1e30", "epochs=20")
    job = Job(tmp_path / "run", *overrides)
    assert job.wait() == 1
    result = job.run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "not_finite")
    assert _log(job).count("ranks on") == 1


@pytest.mark.parametrize(("reason", "starts"), [("rank_failed", 4), ("out_of_memory", 1)])
def test_what_would_fail_again_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, starts: int
) -> None:
    started: list[int] = []

    class Failing:
        pids: Any = ()

        def __init__(self, config: Any, run: Any, lock: Any, restart: int) -> None:
            started.append(restart)
            self.pids = [1]

        def reap(self) -> list[End]:
            self.pids = []
            return [End(1, 1, {"error": "no", "reason": reason})]

        def tell(self, number: int) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(supervisor, "Ranks", Failing)
    events: Any = SimpleNamespace(told=0)
    config, run = compose_config(["launch.max_restarts=3"]), RunDirectory(tmp_path)
    lock: Any = None
    code, failure = supervisor._keep_going(  # pyright: ignore[reportPrivateUsage]
        config, run, lock, events
    )
    assert (code, failure) == (0, End(1, 1, {"error": "no", "reason": reason}))
    assert started == list(range(starts))


def test_run_that_is_finished_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    finished = run.write_result(Result("finished", None, {}, 1, 0))
    assert _supervise(run, _be_plain) == 0
    assert run.read_result() == finished


def _supervise(run: RunDirectory, be: Any, *arguments: Any) -> int:
    process: Any = CONTEXT.Process(target=be, args=(run, *arguments))
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def _be_plain(run: RunDirectory) -> None:
    from syncbn.train.launch.supervisor import supervise

    torch.use_deterministic_algorithms(False)
    os._exit(supervise(run, run.lock()))


def _be_without_forks(run: RunDirectory) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    os.fork = fork
    _be_plain(run)


def _be_counting(run: RunDirectory, file: Path) -> None:
    fork = os.fork

    def counted() -> int:
        with file.open("a") as stream:
            stream.write(f"{len(list(Path('/proc/self/task').iterdir()))}\n")
        return fork()

    os.fork = counted
    _be_plain(run)


def _prepare(run_dir: Path, *overrides: str) -> RunDirectory:
    typed = [*SMALL, *overrides, f"run_dir={run_dir}"]
    with open_run(compose_job(typed), typed) as opened:
        return opened.directory


def test_supervisor_that_cannot_fork_says_so_in_the_result(tmp_path: Path) -> None:
    run = _prepare(tmp_path / "run", *TINY)
    assert _supervise(run, _be_without_forks) == 1
    result = run.read_result()
    assert result is not None
    assert result.status == "failed"
    assert "Resource temporarily unavailable" in str(result.error)
    run.lock().close()


def make_dying_once(in_channels: int, num_classes: int, file: str) -> nn.Module:
    """Return a model, but kill this process where nobody has done so before."""
    if not Path(file).exists():
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def test_supervisor_has_one_thread_at_each_fork(tmp_path: Path) -> None:
    factory = f"model.factory={__name__}:make_dying_once"
    model = ("norm=none", "model=custom", factory, f"+model.arguments.file={tmp_path / 'died'}")
    typed = [*SMALL[1:], *TINY, *model, "launch.max_restarts=2", f"run_dir={tmp_path / 'run'}"]
    with open_run(compose_job(typed), typed) as opened:
        run = opened.directory
    assert _supervise(run, _be_counting, tmp_path / "threads") == 0
    counts = (tmp_path / "threads").read_text().split()
    assert len(counts) >= 4
    assert set(counts) == {"1"}


def _be_unheard(run: RunDirectory) -> None:
    full = os.open("/dev/full", os.O_WRONLY)  # as a console on a disk that is full
    os.dup2(full, 1)
    os.dup2(full, 2)
    _be_plain(run)


def test_ranks_are_started_again_though_nothing_can_be_printed(tmp_path: Path) -> None:
    factory = f"model.factory={__name__}:make_dying_once"
    model = ("norm=none", "model=custom", factory, f"+model.arguments.file={tmp_path / 'died'}")
    typed = [*SMALL[1:], *TINY, *model, "launch.max_restarts=1", f"run_dir={tmp_path / 'run'}"]
    with open_run(compose_job(typed), typed) as opened:
        run = opened.directory
    assert _supervise(run, _be_unheard) == 0
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("told", "threads", "expected"),
    [(None, None, 3), ("2", None, 2), ("4,2", None, 4), ("all", None, 3), ("2", 5, 5)],
)
def test_ranks_share_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, told: str | None, threads: int | None, expected: int
) -> None:
    monkeypatch.setattr(ranks, "count_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    launch = compose_job(["launch.nproc=2"]).launch
    launch.threads = threads
    assert ranks.count_threads(launch) == expected


@pytest.mark.parametrize("instants", [3, pytest.param(30, marks=pytest.mark.long)])
def test_sigterm_at_any_instant_ends_in_order_and_the_run_goes_on_bit_identical(
    tmp_path: Path, instants: int
) -> None:
    started = time.monotonic()
    whole = whole_outcome(tmp_path / "whole", *SHORT)
    duration_s = time.monotonic() - started
    chance = random.Random(instants)
    told = [0.0, *(chance.uniform(0, 1.2) * duration_s for _ in range(instants - 1))]
    number = 0
    for instant_s in told:
        job = Job(tmp_path / str(number), *SHORT)
        job.supervisor.join(instant_s)
        ended = job.supervisor.exitcode
        job.lose_launcher()  # which is taken for SIGTERM, and hurts no process that is gone
        code = job.wait()
        result = job.run.read_result()
        assert result is not None
        if ended == 0 or result.status == "finished":
            assert code in (0, 128 + signal.SIGTERM)
            assert outcome(job.run) == whole
            number += 1
        else:
            assert (code, result.status) == (128 + signal.SIGTERM, "interrupted"), _output(job)
            assert "Traceback" not in _output(job)
    assert whole_outcome(tmp_path / str(number), *SHORT) == whole
