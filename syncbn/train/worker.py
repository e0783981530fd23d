"""One rank of a job, as torchrun starts it: agree on the job, join the process group, train."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] -- documented
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from syncbn.errors import ConfigError, SyncBNError, TrainingError
from syncbn.train.config import Device, TrainConfig, compose_config, from_yaml, to_yaml
from syncbn.train.loop import train
from syncbn.train.run_directory import RunDirectory, open_run_directory

log = logging.getLogger("syncbn.train.worker")  # __name__ is __main__ in a launched rank

_AGREEMENT_TIMEOUT = timedelta(seconds=120)

Job = tuple[TrainConfig, RunDirectory]


def train_from_overrides(overrides: Sequence[str]) -> NoReturn:
    """Be one rank of a job that an external torchrun started with a command line.

    Rank 0 composes the configuration and makes the run directory, for all.

    Does not return: the process ends with exit code 0, 1 where training failed, or 2 where the
    configuration is wrong, on every rank, after rank 0 said why.
    """

    def prepare() -> Job:
        if flags := [argument for argument in overrides if argument.startswith("-")]:
            raise ConfigError(
                f"{' '.join(flags)} is not available under torchrun, which would do it on every "
                "rank; run `syncbn-train` with the same arguments without torchrun, and it starts "
                "the ranks itself"
            )
        config = compose_config(overrides)
        nproc = int(os.environ["LOCAL_WORLD_SIZE"])
        asked = any(override.lstrip("+").startswith("launch.nproc=") for override in overrides)
        if asked and config.launch.nproc != nproc:
            raise ConfigError(
                f"launch.nproc={config.launch.nproc}, but torchrun started {nproc} ranks here; "
                "leave launch.nproc out"
            )
        config.launch.nproc = nproc
        return config, open_run_directory(config)

    _leave(_work(prepare))


@record
def main() -> None:
    """Be one rank of a job that `syncbn.train.launch` started: worker.py RUN_DIR."""
    run = RunDirectory(Path(sys.argv[1]))
    _leave(_work(lambda: (run.read_config(), run)))


def _leave(code: int) -> NoReturn:
    """End this process without finalising the interpreter.

    DistributedDataParallel keeps the process group alive past `destroy_process_group`, and a gloo
    thread that lets go of its last tensor while Python is being finalised aborts the process (seen
    with torch 2.14 in one of 25 runs; github.com/pytorch/pytorch/pull/179291).
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(prepare: Callable[[], Job]) -> int:
    """Do this rank's part, with the run directory locked by rank 0, and return its exit code."""
    with ExitStack() as held:

        def prepare_and_lock() -> Job:
            config, run = prepare()
            held.enter_context(run.lock())
            return config, run

        return _work_locked(prepare_and_lock)


def _work_locked(prepare: Callable[[], Job]) -> int:
    store, rank, world_size = next(rendezvous("env://", timeout=_AGREEMENT_TIMEOUT))
    try:
        config, run = _agree(store, rank, world_size, prepare)
        device = _choose_device(config.launch.device)
    except SyncBNError as error:
        if rank == 0:
            print(f"syncbn-train: {error}", file=sys.stderr)
        return 2
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.launch.timeout_s),
    )
    try:
        _log_to(run if rank == 0 else None)
        log.info("%d ranks on %s, run directory %s", world_size, device.type, run.path)
        train(config, run if rank == 0 else None, device)
    except (ConfigError, TrainingError) as error:  # every rank raises it: one need say it
        if rank == 0:
            log.error("%s", error)
        return 1
    except Exception:
        log.exception("rank %d failed", rank)
        raise
    finally:
        dist.destroy_process_group()
    return 0


def _agree(store: Store, rank: int, world_size: int, prepare: Callable[[], Job]) -> Job:
    """Return what rank 0 prepared, on every rank; or raise what it raised, on every rank."""
    if rank == 0:
        try:
            config, run = prepare()
            store.set("syncbn/job", json.dumps({"config": to_yaml(config), "path": str(run.path)}))
        except SyncBNError as error:
            store.set("syncbn/job", json.dumps({"error": str(error)}))
            # Rank 0 may host the store, and must not take it away before all have read it.
            store.wait([f"syncbn/read/{peer}" for peer in range(1, world_size)], _AGREEMENT_TIMEOUT)
            raise
        return config, run
    job = json.loads(store.get("syncbn/job"))
    store.set(f"syncbn/read/{rank}", "")
    if "error" in job:
        raise ConfigError(job["error"])
    return from_yaml(job["config"]), RunDirectory(Path(job["path"]))


def _choose_device(device: Device) -> torch.device:
    local_rank, nproc = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= nproc
    if device is Device.cuda and not enough:
        raise ConfigError(
            f"launch.device=cuda needs {nproc} GPUs, found {torch.cuda.device_count()}; "
            "use launch.device=cpu"
        )
    if device is Device.cpu or not enough:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _log_to(run: RunDirectory | None) -> None:
    """Log to the terminal and, on rank 0, to the run's log; other ranks log problems alone."""
    logger = logging.getLogger("syncbn")
    logger.setLevel(logging.WARNING if run is None else logging.INFO)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run is not None:
        handlers.append(logging.FileHandler(run.log_file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


if __name__ == "__main__":
    main()
