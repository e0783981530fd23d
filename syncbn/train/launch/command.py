"""The command `syncbn-train`: compose a job, make its run directory, start its ranks, wait."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.changes import resumed_config, stored_config
from syncbn.train.config import config_dir, explain, register_schemas, to_config
from syncbn.train.launch.sweep import be_sweep_job, is_abandoned, is_sweep, sweep
from syncbn.train.run.directory import OpenRun, Result, open_run
from syncbn.train.run.lock import send_job
from syncbn.train.schema import TrainConfig

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
# Agents that have no job yet, by their number of threads. They end when this process does.
_standby: "dict[str, _Agent]" = {}
# What the agent needs, when told to stop, beyond what the ranks may take.
_AGENT_TIMEOUT_S = 15


def main() -> None:
    """Train as the command line says; under torchrun, be one rank of it.

    Raises:
        SystemExit: with code 2 where the configuration is wrong, 1 where training failed, and 128 +
            the signal's number where a signal stopped it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        from syncbn.train.launch.worker import (
            train_from_overrides,  # brings torch, which takes seconds
        )

        train_from_overrides(sys.argv[1:])
    register_schemas()
    # Otherwise Hydra prints errors in its own words and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    decorate = hydra.main(str(config_dir()), "config", version_base="1.3")
    try:
        if is_sweep(sys.argv):
            raise SystemExit(sweep(sys.argv, decorate(_train)))
        if not any(argument.startswith("-") for argument in sys.argv[1:]):
            stored = stored_config(sys.argv[1:])
            # Hydra would compose what is typed with the defaults, which may have other keys.
            if stored is not None:
                _train_job(resumed_config(stored, sys.argv[1:]), sys.argv[1:])
                return
        decorate(_train)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error), 2)
    except ConfigError as error:
        _fail(error, 2)
    except SyncBNError as error:
        _fail(error, 1)


def launch(opened: OpenRun, more: bool = False) -> Result:
    """Start the ranks of a prepared run with torch's elastic launcher, and wait for them.

    Args:
        opened: the run, whose lock they get a part in.
        more: whether there will be another job; its agent loads torch meanwhile.

    Returns:
        How the run ended, which is in its directory too.

    Raises:
        SystemExit: with code 128 + the number, where a signal told this process to stop, after the
            ranks wrote their state.
    """
    run, launch = opened.directory, opened.config.launch
    for change in opened.changes:
        print(f"syncbn-train: going on with {change}", file=sys.stderr)
    threads = str(max(1, _cores() // launch.nproc))
    threads = str(launch.threads or os.environ.get("OMP_NUM_THREADS", threads))
    with told_to_stop() as told:
        agent = _standby.pop(threads, None) or _Agent(threads)
        agent.give(opened)
        if more:
            _standby[threads] = _Agent(threads)
        try:
            code = _wait(agent.process, told, launch.stop_timeout_s + _AGENT_TIMEOUT_S)
        finally:
            agent.kill()
    result = run.read_result()
    # A signal may end ranks that have said already that all is done.
    if result is None or (code != 0 and result.status == "finished" and not told):
        if told:
            result = Result("interrupted", "stopped before the first step", {}, 0, 128 + told[0])
        else:
            error = f"the ranks ended with exit code {code} and left no word"
            result = Result("failed", error, {}, 0, code if code > 0 else 1)
        run.write_result(result)
    if told:
        raise SystemExit(128 + told[0])
    return result


def _train(composed: DictConfig) -> float | None:
    """Run one job and return its validation error, which a sweep may minimize."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return be_sweep_job(composed, launch)
    try:
        return _train_job(to_config(composed), HydraConfig.get().overrides.task)
    except ConfigError as error:  # here, or Hydra would add words of its own
        _fail(error, 2)


def _train_job(config: TrainConfig, overrides: Sequence[str]) -> float | None:
    with open_run(config, overrides) as opened:
        run, result = opened.directory, launch(opened)
    if result.status == "interrupted":
        raise SystemExit(result.exit_code)
    if result.status == "failed":  # of which the ranks have spoken
        _fail(f"training failed; {run.path} has the details", result.exit_code)
    return result.objective


class _Agent:
    """The process that starts the ranks, and what it hears of this one by."""

    def __init__(self, threads: str) -> None:
        self._socket, its_end = socket.socketpair()
        # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on
        # once.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "syncbn.train.launch.agent"],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdin=its_end.fileno(),
            start_new_session=True,
        )
        its_end.close()

    def give(self, opened: OpenRun) -> None:
        """Give it a job, and a part in its lock."""
        send_job(self._socket, opened.directory.path, opened.lock)

    def kill(self) -> None:
        """Make sure that nothing is left of it and its ranks."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()


@contextmanager
def told_to_stop() -> Generator[list[int]]:
    """Collect the signals to stop instead of ending by them, where that is possible."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield told  # signals are for the main thread, whoever that is; our end closes the pipe
        return
    previous = {number: signal.signal(number, note) for number in _STOP_SIGNALS}
    try:
        yield told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(agent: "subprocess.Popen[bytes]", told: list[int], stop_timeout_s: float) -> int:
    """Return the agent's exit code; once told to stop, tell it, and wait a limited time."""
    while not told:
        try:
            return agent.wait(0.1)
        except subprocess.TimeoutExpired:
            if is_abandoned():
                told.append(signal.SIGTERM)
    agent.terminate()
    try:
        return agent.wait(stop_timeout_s)
    except subprocess.TimeoutExpired:
        return 1


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fail(error: object, code: int) -> NoReturn:
    print(f"syncbn-train: {error}", file=sys.stderr)
    raise SystemExit(code)
