"""The ranks of one attempt: forked from a process that has loaded torch, and reaped when they end.

They find each other through a store that this process serves. Its thread starts after the forks and
ends with the attempt, so that this process has one thread alone whenever it forks.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] -- documented

from syncbn.errors import SyncBNError
from syncbn.train.launch.watchdog import ENDED, HUNG_CODE, STOP_SIGNALS, WATCHED
from syncbn.train.launch.worker import be_launched_rank
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.lock import RunLock
from syncbn.train.run.reasons import RANK_FAILED, RANK_HUNG, RANK_KILLED, reason_of
from syncbn.train.schema import LaunchConfig, TrainConfig

HANDLED = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD)
"""The signals of which whoever starts ranks keeps handlers that are not for the ranks."""

_HOST = "127.0.0.1"
_WORD_BYTES = 1 << 15  # fits into a pipe, so that nobody waits to write it
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        rank: which one.
        code: its exit code; negative: the signal that killed it.
        word: what it said last: {"code"} if it ended in order, {"error", "reason"} if it failed, or
            nothing; of one that hung and was killed, {"hung"}, which is what is known of that.
    """

    rank: int
    code: int
    word: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def is_orderly(self) -> bool:
        """Whether it did all that it had to, be it that all ranks failed alike."""
        return self.code == self.word.get("code")

    @property
    def reason(self) -> str:
        """The code of why it failed."""
        if "hung" in self.word or self.code == HUNG_CODE:
            return RANK_HUNG
        return RANK_KILLED if self.code < 0 else self.word.get("reason", RANK_FAILED)

    def describe(self) -> str:
        """Return in one line how it ended."""
        if "hung" in self.word:
            return f"{self.word['hung']}, and was killed"
        if self.code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        if self.code == HUNG_CODE:
            return f"rank {self.rank} hung, and ended itself; its output says where"
        if "error" in self.word:
            return f"rank {self.rank}: {self.word['error']}"
        return f"rank {self.rank} ended with exit code {self.code}"


class Ranks:
    """The ranks of one attempt; starts them, from the main thread and as the only thread.

    Each is the leader of a process group of its own, to which the processes that fetch its samples
    belong, and is killed by the kernel when this process ends.

    Args:
        config: the job.
        run: the run's directory.
        lock: of the directory, in which each rank gets a part.
        restart: how often ranks were started before.
    """

    def __init__(self, config: TrainConfig, run: RunDirectory, lock: RunLock, restart: int) -> None:
        launch = config.launch
        self._alive: dict[int, tuple[int, int]] = {}
        listener = socket.create_server((_HOST, 0), backlog=launch.nproc + 8)
        port = listener.getsockname()[1]
        environment = _environment(launch, port, restart)
        # A signal before a rank has left this process's handlers behind would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            for rank in range(launch.nproc):
                reader, writer = os.pipe()
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    own = environment | {name: str(rank) for name in _NUMBERS}
                    _be_rank(config, run, lock, own, parent, writer)
                os.close(writer)
                os.set_blocking(reader, False)
                self._alive[pid] = rank, reader
        except OSError:
            self.kill()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        self._store: TCPStore | None = TCPStore(
            _HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @property
    def pids(self) -> list[int]:
        """The processes of those that have not been reaped."""
        return list(self._alive)

    def reap(self) -> list[End]:
        """Return how those ended that have ended since the last call, the killed ones first."""
        ends: list[End] = []
        for pid, (rank, reader) in list(self._alive.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._alive[pid]
                code, word = os.waitstatus_to_exitcode(status), _read_word(reader)
                if code == -signal.SIGKILL:
                    word |= self._why_ended(rank)
                ends.append(End(rank, code, word))
        return sorted(ends, key=lambda end: end.code)

    def _why_ended(self, rank: int) -> dict[str, str]:
        """Return what another rank says of one that it has killed; nothing if none has."""
        key = f"{WATCHED}/{ENDED}/{rank}"
        if self._store is None or not self._store.check([key]):
            return {}
        return {"hung": self._store.get(key).decode()}

    def give_up(self, after_s: float) -> End:
        """Kill those that have not ended, and return of the first of them that it hung.

        Args:
            after_s: how long the others had ended before.
        """
        rank = min(rank for rank, _ in self._alive.values())
        self.kill()
        hung = f"rank {rank} did not end within {after_s:g} s of the others"
        return End(rank, -signal.SIGKILL, {"hung": hung})

    def tell(self, number: int) -> None:
        """Send a signal to those that have not ended."""
        for pid in self._alive:
            os.kill(pid, number)  # it is there, if only to be reaped

    def kill(self) -> None:
        """Kill those that have not ended, with what they have started, and reap them."""
        for pid in self._alive:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)  # which may not have made its group yet
        for pid, (_, reader) in self._alive.items():
            os.waitpid(pid, 0)
            os.close(reader)
        self._alive.clear()

    def close(self) -> None:
        """Kill those that have not ended, and stop serving their store."""
        self.kill()
        self._store = None


_NUMBERS = ("RANK", "LOCAL_RANK", "ROLE_RANK")


def _environment(launch: LaunchConfig, port: int, restart: int) -> dict[str, str]:
    """Return the variables by which torch's ranks find each other, without the rank's number."""
    size = str(launch.nproc)
    sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")
    return dict.fromkeys(sizes, size) | {
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(count_threads(launch)),
        "TORCHELASTIC_MAX_RESTARTS": str(launch.max_restarts),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def count_threads(launch: LaunchConfig) -> int:
    """Return how many threads each rank computes with on the CPU."""
    if launch.threads is not None:
        return launch.threads
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # more are for nesting
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return max(1, count_cores() // launch.nproc)


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _be_rank(
    config: TrainConfig,
    run: RunDirectory,
    lock: RunLock,
    environment: dict[str, str],
    parent: int,
    writer: int,
) -> NoReturn:
    """Be a rank, in a process that was just forked, and end it."""
    code, word = 1, {}
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        _die_with(parent)
        os.environ.update(environment)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        os.register_at_fork(after_in_child=lambda: os.close(writer))
        code = be_launched_rank(config, run, lock)
        word = {"code": code}
    except SystemExit as error:  # of the user's own code
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except SyncBNError as error:
        word = {"error": str(error), "reason": reason_of(error, RANK_FAILED)}
    except BaseException as error:
        traceback.print_exc()
        word = {
            "error": f"{type(error).__name__}: {error}",
            "reason": reason_of(error, RANK_FAILED),
        }
    finally:
        _leave(code, word, writer)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, or end it if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _leave(code: int, word: dict[str, Any], writer: int) -> NoReturn:
    """Say how this rank ended, and end it without finalizing the interpreter.

    After a failure, the exception's frames hold the DistributedDataParallel wrapper, which keeps
    the process group alive past `destroy_process_group`. A gloo thread that lets go of its last
    tensor while Python is being finalized aborts the process (pytorch/pytorch#179291).
    """
    with suppress(OSError, ValueError):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    if "error" in word:
        word["error"] = (word["error"].strip().splitlines() or [""])[0][: _WORD_BYTES // 8]
    with suppress(OSError):
        os.write(writer, json.dumps(word).encode())
    os._exit(code)


def _read_word(reader: int) -> dict[str, Any]:
    """Return what a rank that has ended wrote last, and close the pipe that it came by."""
    try:
        return json.loads(os.read(reader, _WORD_BYTES))
    except (BlockingIOError, ValueError):  # a process that it left behind may hold the other end
        return {}
    finally:
        os.close(reader)
