"""Training jobs as real processes that tests can kill, started in a fraction of a second."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed import (
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.train.changes import compose_job
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory, open_run
from syncbn.train.run.lock import RunLock
from tests.support.world import CONTEXT

SMALL = ("model.width=4", "track=none", "launch.device=cpu", "launch.threads=1")


class Job:
    """A run under its supervisor, as the fork server starts it, without server and launcher.

    Args:
        run_dir: where it trains; resumed if it is there.
        overrides: of the configuration, besides small ones.
    """

    small: tuple[str, ...] = SMALL

    def __init__(self, run_dir: Path, *overrides: str) -> None:
        small = self.small[1:] if "model=custom" in overrides else self.small
        typed = [*small, *overrides, f"run_dir={run_dir}"]
        with open_run(compose_job(typed), typed) as opened:
            self.run: RunDirectory = opened.directory
            its_end, self._launcher = socket.socketpair()
            self.supervisor: Any = CONTEXT.Process(target=_be_supervisor, args=(its_end, self.run))
            self.supervisor.start()
            its_end.close()
            socket.send_fds(self._launcher, [b"lock"], [opened.lock.fileno()])

    def wait(self, timeout_s: float = 60) -> int:
        """Return the supervisor's exit code, after making sure that nothing is left of the job."""
        self.supervisor.join(timeout_s)
        code = self.supervisor.exitcode
        self.kill_all()
        assert code is not None, f"the job did not end within {timeout_s} s"
        return code

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks."""
        return children(self.supervisor.pid)

    def kill_all(self) -> None:
        """Kill the supervisor, with which its ranks end."""
        ranks = self.ranks()
        self.supervisor.kill()
        self.supervisor.join()
        self._launcher.close()
        wait_until(lambda: not any(is_alive(rank) for rank in ranks), timeout_s=10)

    def lose_launcher(self) -> None:
        """Close what the supervisor hears of its launcher by, as the launcher's death does."""
        self._launcher.close()


def _be_supervisor(launcher: socket.socket, run: RunDirectory) -> None:
    os.setsid()
    _write_to(Path(f"{run.path}.out"))
    torch.use_deterministic_algorithms(False)
    from syncbn.train.launch.supervisor import supervise

    _, (lock,), _, _ = socket.recv_fds(launcher, len(b"lock"), 1)
    os._exit(supervise(run, RunLock(lock), launcher))


def _write_to(file: Path) -> None:
    """Append what this process prints to a file."""
    with file.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def under_torchrun(overrides: Sequence[str], cwd: Path, nproc: int = 2) -> tuple[list[int], str]:
    """Run `syncbn-train` on ranks that are told what torchrun tells its ranks.

    Args:
        overrides: of the configuration, as on the command line.
        cwd: the directory in which the ranks run.
        nproc: the number of ranks.

    Returns:
        The exit codes by rank, and the output of all ranks.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    output = cwd.with_name(f"{cwd.name}.out")
    ranks: list[Any] = []
    for rank in range(nproc):
        environment = {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        target = (environment, list(overrides), cwd, output)
        ranks.append(CONTEXT.Process(target=_be_rank_of_torchrun, args=target))
        ranks[-1].start()
    for each in ranks:
        each.join(60)
        each.kill()
        each.join()
    return [each.exitcode for each in ranks], output.read_text()


def _be_rank_of_torchrun(
    environment: dict[str, str], overrides: list[str], cwd: Path, output: Path
) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    _write_to(output)
    sys.argv[1:] = overrides
    torch.use_deterministic_algorithms(False)
    from syncbn.train.launch.command import main

    main()


class Quiet:
    """Stands in for a watch, which belongs to a process of its own."""

    stop_signal = 0

    def at(self, step: int, doing: str) -> None:
        pass

    def moving(self, parts: Iterable[Any], step: int, doing: str) -> Iterator[Any]:
        return iter(parts)

    def working(self, step: int, doing: str) -> AbstractContextManager[None]:
        return nullcontext()


def quiet_watch() -> Any:
    """Return what stands in for a watch, which belongs to a process of its own."""
    return Quiet()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started; none where it has ended."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    """Return when a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def outcome(run: RunDirectory) -> dict[str, Any]:
    """Return all that must not depend on whether a run was stopped, in a comparable form."""
    newest = read_checkpoint(checkpoint_files(run.checkpoints_dir)[0])
    return {
        "position": newest.position,
        "states": comparable(newest.states),
        "generators": comparable(newest.generators),
        "metrics": [_timeless(line) for line in run.read_metrics()],
        "steps": [_timeless(json.loads(line)) for line in run.steps_file.read_text().splitlines()],
        "bundle": (run.bundle_dir / "model.safetensors").read_bytes(),
    }


def whole_outcome(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Return the outcome of a job that nobody stops."""
    job = Job(run_dir, *overrides)
    assert job.wait() == 0, Path(f"{run_dir}.out").read_text()
    return outcome(job.run)


def _timeless(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key not in ("images_per_s", "time")}


def comparable(value: Any) -> Any:
    """Return a state with its tensors as bytes, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value
