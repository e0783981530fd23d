"""The command `syncbn-train`: compose a job, make its run directory, start its ranks, wait."""

import io
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import syncbn
from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.changes import resumed_config, stored_config
from syncbn.train.config import config_dir, explain, register_schemas, to_config
from syncbn.train.launch.client import ForkServer, Launched
from syncbn.train.launch.sweep import be_sweep_job, is_abandoned, is_sweep, sweep
from syncbn.train.run.directory import OpenRun, Result, open_run
from syncbn.train.run.reasons import KILLED, RANK_FAILED
from syncbn.train.schema import TrainConfig

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
# Forks the jobs of this process, if it has no part in a sweep whose process has one. Ends with it.
_server = ForkServer()
# What a supervisor needs, when told to stop, beyond what the ranks may take.
_SUPERVISOR_TIMEOUT_S = 15
_KILL_TIMEOUT_S = 10
_POLL_S = 0.1


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
    if "--version" in sys.argv[1:]:
        print(f"syncbn-train {syncbn.__version__}")
        return
    register_schemas()
    # Otherwise Hydra prints errors in its own words and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    decorate = hydra.main(str(config_dir()), "config", version_base="1.3")
    try:
        if is_sweep(sys.argv):
            raise SystemExit(sweep(sys.argv, decorate(_train), _server))
        if not any(argument.startswith("-") for argument in sys.argv[1:]):
            stored = stored_config(sys.argv[1:])
            # Hydra would compose what is typed with the defaults, which may have other keys.
            if stored is not None:
                _train_job(resumed_config(stored, sys.argv[1:]), sys.argv[1:])
                return
        with _showing_help():
            decorate(_train)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error), 2)
    except ConfigError as error:
        _fail(error, 2)
    except SyncBNError as error:
        _fail(error, 1)


@contextmanager
def _showing_help() -> Generator[None]:
    """Leave out of Hydra's help, if it is asked for, the groups that conf/ alone chooses from."""
    if not {"--help", "-h"} & set(sys.argv[1:]):
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        lines = text.getvalue().splitlines(keepends=True)
        print("".join(line for line in lines if not line.startswith("schema/")), end="")


def launch(opened: OpenRun) -> Result:
    """Have a supervisor start the ranks of a prepared run, and wait for its end.

    Args:
        opened: the run, whose lock they get a part in.

    Returns:
        How the run ended, which is in its directory too.

    Raises:
        SystemExit: with code 128 + the number, where a signal told this process to stop, after the
            ranks wrote their state.
        TrainingError: no supervisor could be started.
    """
    run = opened.directory
    for change in opened.changes:
        print(f"syncbn-train: going on with {change}", file=sys.stderr)
    with told_to_stop() as told:
        job = _server.launch(run.path, opened.lock)
        try:
            code = _wait(job, told, opened.config.launch.stop_timeout_s + _SUPERVISOR_TIMEOUT_S)
        finally:
            job.close()
    result = run.read_result()
    if result is None:  # the supervisor was killed, or could not write
        if told:
            result = Result("interrupted", "stopped before the first step", {}, 0, 128 + told[0])
        elif code < 0:
            error = f"what started the ranks was killed by {signal.Signals(-code).name}"
            result = Result("failed", error, {}, 0, 1, reason=KILLED)
        else:
            error = f"the supervisor ended with exit code {code} and left no word"
            result = Result("failed", error, {}, 0, code or 1, reason=RANK_FAILED)
        result = run.write_result(result)
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


def _wait(job: Launched, told: list[int], stop_timeout_s: float) -> int:
    """Return the job's exit code; once told to stop, tell it, and wait a limited time."""
    while not told:
        code = job.wait(_POLL_S)
        if code is not None:
            return code
        if is_abandoned():
            told.append(signal.SIGTERM)
    job.stop()
    code = job.wait(stop_timeout_s)
    if code is None:
        job.kill()
        code = job.wait(_KILL_TIMEOUT_S)
    return -signal.SIGKILL if code is None else code


def _fail(error: object, code: int) -> NoReturn:
    print(f"syncbn-train: {error}", file=sys.stderr)
    raise SystemExit(code)
