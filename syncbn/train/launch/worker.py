"""One rank of a job: agree on the job with the others, join the process group, train."""

import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import (
    Store,  # pyright: ignore[reportPrivateImportUsage] -- documented
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from syncbn.errors import ConfigError, DataError, ReplicaError, SyncBNError, TrainingError
from syncbn.train.changes import compose_job
from syncbn.train.config import from_yaml, to_yaml
from syncbn.train.device import (
    choose_device,
    join_process_group,
    leave_process_group,
    why_not_on_gpus,
)
from syncbn.train.launch.permit import check_own_permit
from syncbn.train.launch.rendezvous import agree, prefixed
from syncbn.train.launch.watchdog import WATCHED, Watch
from syncbn.train.loop import train
from syncbn.train.run.directory import Result, RunDirectory, open_run
from syncbn.train.run.lock import RunLock
from syncbn.train.run.reasons import RANK_FAILED, RANK_HUNG, reason_of
from syncbn.train.run.report import summarize
from syncbn.train.schema import TrainConfig

log = logging.getLogger(__name__)

_AGREEMENT_TIMEOUT = timedelta(seconds=120)

Job = tuple[TrainConfig, RunDirectory]


def train_from_overrides(overrides: Sequence[str]) -> NoReturn:
    """Be one rank of a job that an external torchrun started with a command line.

    Rank 0 composes the configuration and makes the run directory, for all.

    Does not return: the process ends with the exit code of the job, the same on every rank, after
    rank 0 said why.
    """

    def prepare() -> Job:
        if flags := [argument for argument in overrides if argument.startswith("-")]:
            rest = [argument for argument in overrides if not argument.startswith("-")]
            raise ConfigError(
                f"{' '.join(flags)} is not available under torchrun, which would do it on every "
                f"rank; type `{' '.join(['syncbn-train', *flags, *rest])}`, which starts the "
                "ranks itself"
            )
        config = compose_job(overrides)
        nproc = int(os.environ["LOCAL_WORLD_SIZE"])
        asked = any(override.lstrip("+").startswith("launch.nproc=") for override in overrides)
        if asked and config.launch.nproc != nproc:
            raise ConfigError(
                f"launch.nproc={config.launch.nproc}, but torchrun started {nproc} ranks here; "
                "leave launch.nproc out"
            )
        config.launch.nproc = nproc
        typed = [*overrides, f"launch.nproc={nproc}"]
        opened = held.enter_context(open_run(config, typed, _torchrun(), check_own_permit))
        opened.lock.keep_from_children()
        opened.directory.begin_attempt(opened.config.epochs)
        for change in opened.changes:
            print(f"syncbn-train: going on with {change}", file=sys.stderr)
        return opened.config, opened.directory

    with ExitStack() as held:
        code = record(_agree_and_work)(prepare) or 0
    _leave(code)


def be_launched_rank(config: TrainConfig, run: RunDirectory, lock: RunLock) -> int:
    """Be one rank of a job that a supervisor started, and return its exit code.

    Args:
        config: the job.
        run: the run's directory.
        lock: of the directory, which this process holds to its end.

    Raises:
        Exception: this rank failed, and others may not have.
    """
    lock.keep_from_children()
    # The store is of this attempt alone, so there is nothing to agree on.
    return _work((config, run), _connect(), _connect())


def _torchrun() -> str:
    """Return what tells the torchrun that started this rank from any other, ever.

    A torchrun runs one job, and starts its ranks again after a failure: with the same job.
    """
    stat = Path(f"/proc/{os.getppid()}/stat")
    since = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
    return f"{platform.node()} {os.getppid()} {since} {os.environ['TORCHELASTIC_RUN_ID']}"


def _leave(code: int) -> NoReturn:
    """End this process without finalizing the interpreter.

    After a failure, the exception's frames hold the DistributedDataParallel wrapper, which keeps
    the process group alive past `destroy_process_group`. A gloo thread that lets go of its last
    tensor while Python is being finalized aborts the process (pytorch/pytorch#179291).
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _agree_and_work(prepare: Callable[[], Job]) -> int:
    """Learn the job from rank 0, do this rank's part, and return its exit code.

    Args:
        prepare: called on rank 0; returns the job, whose run directory is locked.
    """
    shared, rank, world_size = next(rendezvous("env://", timeout=_AGREEMENT_TIMEOUT))
    try:
        timeout_s = _AGREEMENT_TIMEOUT.total_seconds()
        # The store's own time-outs do not apply where its machine cannot be reached any more.
        faulthandler.dump_traceback_later(2 * timeout_s, exit=True)
        text, prefix = agree(shared, rank, world_size, partial(_told, prepare), timeout_s)
        faulthandler.cancel_dump_traceback_later()
        told = json.loads(text)
        if "error" in told:
            raise ConfigError(told["error"])
        job = from_yaml(told["config"]), RunDirectory(Path(told["path"]))
    except SyncBNError as error:
        if rank == 0:
            print(f"syncbn-train: {error}", file=sys.stderr)
        return _exit_code(error)
    return _work(job, prefixed(prefix, shared), prefixed(prefix, _connect()))


def _work(job: Job, store: Store, own_store: Store) -> int:
    """Do this rank's part of a job, and return its exit code.

    Args:
        job: the same on every rank.
        store: of all ranks of this attempt, and of no other.
        own_store: another connection to it, for a thread of its own.
    """
    config, run = job
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        local_rank, nproc = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        device = choose_device(config.launch, local_rank, nproc)
    except ConfigError as error:
        if rank == 0:
            print(f"syncbn-train: {error}", file=sys.stderr)
            _record(run, _failure(error))
        return 2
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    timeout_s = config.launch.timeout_s
    watch = Watch(
        prefixed(WATCHED, own_store),
        rank,
        world_size,
        timeout_s,
        config.launch.stop_timeout_s,
        config.launch.load_timeout_s,
    )
    watch.start()
    try:
        join_process_group(device, config.launch, store, rank, world_size)
    except TrainingError as error:  # each rank knows its own GPU alone
        print(f"syncbn-train: {error}", file=sys.stderr)
        if rank == 0:
            _record(run, _failure(error))
        raise
    watch.heed_signals()
    failed = False
    try:
        _log_to(run if rank == 0 else None)
        log.info("%d ranks on %s, run directory %s", world_size, device.type, run.path)
        if rank == 0 and (reason := why_not_on_gpus(config.launch, nproc)):
            log.warning("%s", reason)
        result = train(config, run if rank == 0 else None, device, watch)
        if rank == 0:  # at once, as leaving the others may fail
            _record(run, result)
    except (ConfigError, TrainingError) as error:  # every rank raises it: one need say it
        code = _exit_code(error)
        if rank == 0:
            log.error("%s", error)
            _record(run, _failure(error))
        return code
    except Exception as error:
        failed = True
        others, known = _is_about_others(error), True
        reason, code = (watch.blame() if others else ""), reason_of(error, RANK_FAILED)
        if reason:
            code = RANK_HUNG
            log.error("rank %d gave up waiting: %s", rank, reason)
        elif _is_timeout(error) and not watch.is_told:
            reason = (
                f"rank {rank} got no answer within launch.timeout_s={timeout_s:g}, though no rank "
                f"hangs: the network between them is cut or too slow ({_first_line(error)})"
            )
            code = RANK_HUNG
            log.exception("%s", reason)
        elif others and watch.is_told:
            reason, known = "another rank failed", False  # as whoever stopped this one will say
        else:
            reason = f"rank {rank} failed: {error}"
            if isinstance(error, DataError):
                log.error("%s", reason)
            else:
                log.exception("rank %d failed", rank)
                reason = f"rank {rank} failed: {type(error).__name__}: {error}"
        if rank == 0 and known:
            _record(run, Result("failed", reason, {}, 0, 1, reason=code))
        watch.end_stopped()
        raise TrainingError(reason).because(code) from error
    finally:
        watch.end()
        for loader_worker in multiprocessing.active_children():
            loader_worker.kill()  # it hangs, and ignores what Python would end it by, and wait for
        gc.collect()  # the wrapper may be in a circle, and would keep the group's threads alive
        leave_process_group(failed)
    if rank == 0 and result.status == "finished":
        print(summarize(run.path))
    return result.exit_code


def _exit_code(error: SyncBNError) -> int:
    return 2 if isinstance(error, ConfigError) else 1


def _failure(error: SyncBNError) -> Result:
    return Result("failed", str(error), {}, 0, _exit_code(error), reason=reason_of(error))


def _record(run: RunDirectory, result: Result) -> None:
    try:
        run.write_result(result)
    except OSError as error:  # a full disk, most likely, of which the log has spoken
        log.error("cannot write %s: %s", run.result_file, error.strerror)


def _is_about_others(error: Exception) -> bool:
    """Return whether an error says that another rank did not answer."""
    text = str(error).lower()
    return isinstance(error, ReplicaError | dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
    )


def _is_timeout(error: Exception) -> bool:
    """Return whether an error says that a wait for another rank has ended for its length."""
    text = str(error).lower()
    if isinstance(error, ReplicaError):  # of a sum in shared memory
        return "did not come within the group's time-out" in text
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, SyncBNError)
    return is_torchs and "gloo" in text and "timed out" in text


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _connect() -> Store:
    """Return a connection to the ranks' store."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_AGREEMENT_TIMEOUT,
    )


def _told(prepare: Callable[[], Job]) -> str:
    """Return rank 0's job, or its error, as text."""
    try:
        config, run = prepare()
    except SyncBNError as error:
        return json.dumps({"error": str(error)})
    return json.dumps({"config": to_yaml(config), "path": str(run.path)})


def _log_to(run: RunDirectory | None) -> None:
    """Log to the terminal and, on rank 0, to the run's log; other ranks log problems alone."""
    logging.raiseExceptions = False  # a full disk is said once, not with every line
    logger = logging.getLogger("syncbn")
    logger.setLevel(logging.WARNING if run is None else logging.INFO)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run is not None:
        handlers.append(logging.FileHandler(run.log_file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
