"""Runs that are killed at any instant end as if they had not been."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.jobs import Job, outcome, whole_outcome

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

# Everything that a step may depend on and a checkpoint must hold.
FULL = (
    *(
        "epochs=3",
        "data.batch_size=32",
        "log_every_steps=1",
        "checkpoint.every_steps=4",
        "optim.accumulate=2",
    ),
    *("optim.ema_decay=0.9", "optim.clip_norm=1", "schedule=one_cycle", "optim=adamw"),
)


@pytest.mark.long
@pytest.mark.parametrize(("nproc", "kills"), [(2, 20), (4, 4), (2, 2)])
def test_run_killed_at_random_instants_ends_bit_identical(
    tmp_path: Path, nproc: int, kills: int
) -> None:
    overrides = (*FULL, f"launch.nproc={nproc}")
    whole = whole_outcome(tmp_path / "whole", *overrides)
    started = time.monotonic()
    assert whole_outcome(tmp_path / "again", *overrides) == whole
    duration_s = time.monotonic() - started
    chance = random.Random(nproc)
    killed = number = 0
    while killed < kills:
        run_dir = tmp_path / f"killed-{number}"
        job = Job(run_dir, *overrides)
        # From before the ranks are there to after the last step.
        job.supervisor.join(chance.uniform(0.2, 1) * duration_s)
        if job.supervisor.exitcode is None:
            killed += 1
            ranks = job.ranks()
            if ranks and chance.random() < 0.5:  # one rank; the supervisor ends the others
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(ranks), signal.SIGKILL)
                assert job.wait() in (0, 1)  # 0: its last act was done
            else:
                job.kill_all()
        assert job.wait() in (0, 1, -signal.SIGKILL)
        if _finished(job):
            assert outcome(job.run) == whole
            number += 1
    assert whole_outcome(tmp_path / f"killed-{number}", *overrides) == whole


def _finished(job: Job) -> bool:
    result = job.run.read_result()
    return result is not None and result.status == "finished"
