"""A tiny run in forked ranks, whose attempts end where a test wants them to."""

import gc
import os
import pickle
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import (
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.train.changes import compose_job
from syncbn.train.run.directory import RunDirectory, open_run
from syncbn.train.run.lock import RunLock
from tests.support.places import Act, Files, Snapshot, Tracer, read_files, write_files
from tests.support.world import CONTEXT

TINY = (
    *("data=synthetic", "data.samples=24", "data.test_samples=10", "data.size=4"),
    *("data.classes=2", "data.batch_size=3", "data.validation=0.34", "model.width=2"),
    *("recalibrate=true", "optim.ema_decay=0.9", "log_every_steps=1", "checkpoint.every_steps=2"),
    *("track=none", "launch.device=cpu", "launch.threads=1", "launch.nproc=2", "name=tiny"),
)
"""A job of 16 training samples, which are 3 steps on 2 ranks."""
_DEADLINE_S = 60
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Attributes:
        codes: the exit code of each rank; negative: the signal that killed it.
        places: what each rank passed; empty for one that was killed.
    """

    codes: list[int]
    places: list[list[str]]

    @property
    def is_killed(self) -> bool:
        """Whether a rank was killed."""
        return -signal.SIGKILL in self.codes


class TinyRun:
    """A run in a directory of its own, to which it also publishes.

    Args:
        work: for its files; made anew by `clear`.
        overrides: of the configuration, besides those of `TINY`.
    """

    def __init__(self, work: Path, *overrides: str) -> None:
        self.work = work
        self.directory = RunDirectory(work / "run")
        self.published = work / "published"
        self._typed = [
            *(*TINY, *overrides),
            *(f"run_dir={self.directory.path}", f"publish={self.published}"),
        ]
        self._config = compose_job(self._typed)
        self.clear()

    def clear(self, files: Files | None = None) -> None:
        """Forget all that is there, and put files there instead."""
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        write_files(self.work, files or {})

    def files(self) -> Files:
        """Return what is there."""
        return read_files(self.work)

    def is_finished(self) -> bool:
        """Return whether the run says that it is finished."""
        result = self.directory.read_result()
        return result is not None and result.status == "finished"

    def attempt(self, act: Act | None = None) -> Attempt:
        """Begin the run or go on with it, by its directory alone, until it ends."""
        goes_on = self.directory.config_file.exists()
        typed = [f"run_dir={self.directory.path}"] if goes_on else self._typed
        config = compose_job(typed) if goes_on else self._config
        with open_run(config, typed):
            return self._work_on(act or Act())

    def finish(self) -> None:
        """Go on until the run is finished."""
        if not self.is_finished():
            attempt = self.attempt()
            assert attempt.codes == [0, 0], self.output()
        assert self.is_finished()

    def output(self) -> str:
        """Return what the ranks printed."""
        return self._output.read_text()

    @property
    def _output(self) -> Path:
        return self.work.with_name(f"{self.work.name}.out")

    def _work_on(self, act: Act) -> Attempt:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ranks: list[Any] = []
        pipes: list[connection.Connection] = []
        for rank in range(2):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            target = (self.work, self._output, rank, store.port, act, sender)
            ranks.append(CONTEXT.Process(target=_be_rank, args=target))
            ranks[-1].start()
            sender.close()
            pipes.append(receiver)
        try:
            deadline = time.monotonic() + _DEADLINE_S
            _wait(ranks, deadline)
            ended = [rank.exitcode is not None for rank in ranks]
            codes = [rank.exitcode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        assert all(ended) or -signal.SIGKILL in codes, f"{codes}: {self.output()}"
        return Attempt([rank.exitcode for rank in ranks], [_received(pipe) for pipe in pipes])


def _wait(ranks: Sequence[Any], deadline: float) -> None:
    """Return when all ranks have ended, or one was killed, which is the end of the others."""
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting and time.monotonic() < deadline:
        for sentinel in connection.wait(list(waiting), deadline - time.monotonic()):
            assert isinstance(sentinel, int)
            rank = waiting.pop(sentinel)
            rank.join()
            if rank.exitcode < 0:
                return


def _received(pipe: connection.Connection) -> list[str]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:  # it was killed
        return []


def _be_rank(
    work: Path, output: Path, rank: int, port: int, act: Act, sender: connection.Connection
) -> None:
    with output.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    told |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in told.items()})
    torch.use_deterministic_algorithms(False)
    gc.freeze()  # or the collection at a rank's end would look at all that the server has loaded
    tracer = Tracer(work, rank, act)
    tracer.install()
    from syncbn.train.launch.worker import be_launched_rank

    lock = RunLock(os.open(os.devnull, os.O_WRONLY))  # the test has that of the directory
    run = RunDirectory(work / "run")
    code = be_launched_rank(run.read_config(), run, lock)
    sender.send_bytes(pickle.dumps(tracer.places))
    os._exit(code)


def snapshots(directory: Path) -> list[Snapshot]:
    """Return what was kept in a directory, in order."""
    return [pickle.loads(file.read_bytes()) for file in sorted(directory.glob("*.pickle"))]
