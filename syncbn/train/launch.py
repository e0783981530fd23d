"""The command `syncbn-train`: compose a job, make its run directory, start its ranks, wait."""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

import hydra
import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.errors import ConfigError, SyncBNError, TrainingError
from syncbn.train import worker
from syncbn.train.config import config_dir, explain, register_schemas, to_config
from syncbn.train.run_directory import RunDirectory, open_run_directory

_STOP_TIMEOUT_S = 30
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


def main() -> None:
    """Train as the command line says; under torchrun, be one rank of it.

    Raises:
        SystemExit: with code 2 where the configuration is wrong, 1 where training failed.
    """
    if dist.is_torchelastic_launched():
        worker.train_from_overrides(sys.argv[1:])
    register_schemas()
    # Otherwise Hydra prints errors in its own words and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    decorate = hydra.main(str(config_dir()), "config", version_base="1.3")
    try:
        decorate(_train)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error), 2)
    except ConfigError as error:
        _fail(error, 2)
    except SyncBNError as error:
        _fail(error, 1)


def launch(run: RunDirectory, nproc: int) -> None:
    """Start the ranks of a prepared run with torch's elastic launcher, and wait for them.

    Raises:
        TrainingError: a rank failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={nproc}", "-m", "syncbn.train.worker", str(run.path)]
    # As torchrun would choose, but sharing all cores, and without its warning.
    threads = max(1, (os.cpu_count() or 1) // nproc)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    previous = {number: signal.signal(number, _exit_on_signal) for number in _STOP_SIGNALS}
    ranks = subprocess.Popen(command, env=environment)
    try:
        code = ranks.wait()
    finally:  # Ctrl-C, or one of the signals: the ranks must not outlive this process
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ranks.poll() is None:
            _stop(ranks)
    if code != 0:
        raise TrainingError(
            f"training ended with exit code {code}; the reason is above and in {run.log_file}"
        )


def _train(composed: DictConfig) -> float:
    """Run one job and return its test accuracy, which a sweep may optimise."""
    config = to_config(composed)
    run = open_run_directory(config)
    launch(run, config.launch.nproc)
    return run.read_metrics()[-1]["test_accuracy"]


def _stop(ranks: subprocess.Popen[bytes]) -> None:
    ranks.terminate()
    try:
        ranks.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        ranks.kill()
        ranks.wait()


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"syncbn-train: {error}", file=sys.stderr)
    raise SystemExit(code)
