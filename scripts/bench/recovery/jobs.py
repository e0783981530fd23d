"""Jobs whose ranks are killed while they train, as `syncbn-train` and as torchrun start them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts import REPOSITORY

TIMEOUT_S = 300
_POLL_S = 2e-3
_RESUMED = re.compile(r"resuming in epoch \d+ after step (\d+)")
_TRAIN = str(REPOSITORY / "scripts" / "train.py")
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# The default digits, and a ResNet-18 for images of 32×32 pixels, of a quarter of the usual width.
WORKLOADS = {
    "digits, cnn": ["checkpoint.every_steps=20"],
    "32×32 pixels, ResNet-18": [
        *("data=synthetic", "data.samples=4096", "data.test_samples=32", "data.batch_size=8"),
        *("model=custom", "model.factory=scripts.bench.train.models:resnet18"),
        *("+model.arguments.width=16", "checkpoint.every_steps=10"),
    ],
}
# Who starts the ranks, and starts them again: the supervisor, or torch's agent.
STARTERS = ("ours", "torchrun")


class Running:
    """A job of 2 ranks with one thread each, which goes on until it is ended.

    Args:
        starter: one of `STARTERS`.
        overrides: of the configuration.
        directory: for the run and its output.
    """

    def __init__(self, starter: str, overrides: list[str], directory: Path) -> None:
        self._run = directory / "run"
        typed = [*overrides, f"run_dir={self._run}", "epochs=100000", "log_every_steps=1"]
        typed += ["launch.threads=1", "schedule=constant", "data.validation=0"]
        if starter == "ours":
            typed += ["launch.nproc=2", "launch.max_restarts=1000"]
            command = [sys.executable, _TRAIN, *typed]
        else:
            command = [*_TORCHRUN, "--max-restarts=1000", _TRAIN, *typed]
        self._output = directory / "output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=output,
                stderr=output,
            )
        self._depth = 3 if starter == "ours" else 1  # launcher, server, supervisor; or agent

    def steps(self) -> list[dict[str, Any]]:
        """Return the lines of the optimizer steps that count so far."""
        file = self._run / "steps.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when a condition holds, which is looked at every 2 ms."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the job did not go on:\n{self._output.read_text()}")
            time.sleep(_POLL_S)

    def wait_for_steps(self, steps: int) -> None:
        """Return when so many optimizer steps are made."""
        file = self._run / "steps.jsonl"
        self.wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") >= steps)

    def kill_a_rank(self, number: int) -> float:
        """Kill a rank, and return when that was."""
        ranks = self._ranks()
        os.kill(ranks[number % len(ranks)], signal.SIGKILL)
        return time.time()

    def time_of_return(self, resumed: int) -> float:
        """Return when the first optimizer step was made after the ranks were started again.

        Args:
            resumed: how often they had been before.
        """
        file = self._run / "run.log"
        found: list[str] = []

        def is_resumed() -> bool:
            found[:] = _RESUMED.findall(file.read_text())
            return len(found) > resumed

        self.wait_for(is_resumed)
        logged, step = time.time(), int(found[resumed])
        made: list[float] = []

        def is_made() -> bool:
            # What the dead had made of it is forgotten then.
            made[:] = [
                line["time"] for line in self.steps()[step:] if line["time"] > logged - 10 * _POLL_S
            ]
            return bool(made)

        self.wait_for(is_made)
        return made[0]

    def count_resumed(self) -> int:
        """Return how often the ranks have gone on from a checkpoint."""
        return len(_RESUMED.findall((self._run / "run.log").read_text()))

    def end(self) -> None:
        """Kill all processes of the job."""
        ranks = self._ranks()
        for process in (*self._ancestors(), *ranks):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _ancestors(self) -> list[int]:
        """Return the processes from the one that was started to the one that starts ranks."""
        found = [self._process.pid]
        while len(found) < self._depth and (children := _children(found[-1])):
            found.append(children[0])
        return found

    def _ranks(self) -> list[int]:
        found = self._ancestors()
        return _children(found[-1]) if len(found) == self._depth else []


@contextmanager
def running(starter: str, overrides: list[str], directory: Path) -> Generator[Running]:
    """Start a job, and end it with the context."""
    directory.mkdir()
    job = Running(starter, overrides, directory)
    try:
        yield job
    finally:
        job.end()


def _children(process: int) -> list[int]:
    with suppress(OSError):
        return [
            int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    return []
