"""The command `syncbn-train`: compose a job, make its run directory, start its ranks, wait."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
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
from syncbn.train.config import config_dir, explain, register_schemas, to_config
from syncbn.train.launch.sweep import be_sweep_job, is_abandoned, is_sweep, sweep
from syncbn.train.run.directory import Result, RunDirectory, open_run_directory
from syncbn.train.schema import LaunchConfig

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
# Agents that have no job yet, by their number of threads. They end when this process does.
_standby: "dict[str, subprocess.Popen[bytes]]" = {}
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
        decorate(_train)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error), 2)
    except ConfigError as error:
        _fail(error, 2)
    except SyncBNError as error:
        _fail(error, 1)


def launch(run: RunDirectory, launch: LaunchConfig, more: bool = False) -> Result:
    """Start the ranks of a prepared run with torch's elastic launcher, and wait for them.

    Args:
        run: its directory.
        launch: how many ranks, and how long to wait for them to stop.
        more: whether there will be another job; its agent loads torch meanwhile.

    Returns:
        How the run ended, which is in its directory too.

    Raises:
        SystemExit: with code 128 + the number, where a signal told this process to stop, after the
            ranks wrote their state.
    """
    threads = str(max(1, _cores() // launch.nproc))
    threads = str(launch.threads or os.environ.get("OMP_NUM_THREADS", threads))
    with told_to_stop() as told:
        agent = _standby.pop(threads, None) or _start_agent(threads)
        assert agent.stdin is not None
        agent.stdin.write(f"{run.path}\n".encode())
        agent.stdin.flush()
        if more:
            _standby[threads] = _start_agent(threads)
        try:
            code = _wait(agent, told, launch.stop_timeout_s + _AGENT_TIMEOUT_S)
        finally:
            _kill(agent)
    result = run.read_result()
    if result is None or (code != 0 and result.status == "finished"):
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
        config = to_config(composed)
        run = open_run_directory(config)
    except ConfigError as error:  # here, or Hydra would add words of its own
        _fail(error, 2)
    result = launch(run, config.launch)
    if result.status == "interrupted":
        raise SystemExit(result.exit_code)
    if result.status == "failed":  # of which the ranks have spoken
        _fail(f"training failed; {run.path} has the details", result.exit_code)
    return result.objective


def _start_agent(threads: str) -> "subprocess.Popen[bytes]":
    # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-m", "syncbn.train.launch.agent"],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


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


def _kill(agent: "subprocess.Popen[bytes]") -> None:
    """Make sure that nothing is left of the agent and its ranks."""
    assert agent.stdin is not None
    with suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    agent.stdin.close()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fail(error: object, code: int) -> NoReturn:
    print(f"syncbn-train: {error}", file=sys.stderr)
    raise SystemExit(code)
