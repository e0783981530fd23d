"""The command `syncbn-dispatch`: start the jobs of a store, and watch them."""

import argparse
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from types import FrameType

from syncbn.errors import JobError, JobStoreError, SyncBNError
from syncbn.jobs.dispatch.claim import Claim
from syncbn.jobs.dispatch.dispatcher import Dispatcher
from syncbn.jobs.dispatch.environment import environment_for_jobs
from syncbn.jobs.dispatch.retention import tidy
from syncbn.jobs.dispatch.run_files import RunFiles
from syncbn.jobs.dispatch.slots import Capacity, Sharing
from syncbn.jobs.engines.http import HttpServer
from syncbn.jobs.engines.protocol import Attempt, Engine
from syncbn.jobs.engines.ray import TIMEOUT_S as RAY_TIMEOUT_S
from syncbn.jobs.engines.ray import RayEngine, RayOptions
from syncbn.jobs.engines.slurm import SlurmEngine, SlurmOptions
from syncbn.jobs.job import DispatcherInfo, Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from syncbn.train.run.publish import MANIFEST_FILE

log = logging.getLogger("syncbn.jobs")

ENGINES = ("local", "ray", "slurm")
_TICK_S = 0.05
# How often it looks at what runs, and at everything.
_ACTIVE_S = 0.2
_IDLE_S = 1.0
_ALIVE_S = 1.0
_RETENTION_S = 60.0
_TROUBLE_S = 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Dispatch until SIGTERM or SIGINT; jobs that run go on, and are found by the next dispatcher.

    Raises:
        SystemExit: with code 2 if an option is wrong, 1 if the store is not to be had.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    told = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if options.until_stdin_closes:
        threading.Thread(target=_wait_for_end, args=(told,), name="stdin", daemon=True).start()
    try:
        run(_setup(options), told)
    except SyncBNError as error:
        print(f"syncbn-dispatch: {error}", file=sys.stderr)
        raise SystemExit(1) from error


@dataclass(frozen=True)
class Setup:
    """What a dispatcher is made of.

    Attributes:
        directory: of the store.
        models: where models are published; None: nowhere.
        capacity: what it gives to jobs.
        engine_name: where it runs them.
        make_engine: makes that, which takes a while and memory.
    """

    directory: Path
    models: Path | None
    capacity: Capacity
    engine_name: str
    make_engine: Callable[[], Engine]


def run(setup: Setup, told: threading.Event) -> None:
    """Dispatch until told to end.

    Raises:
        JobError: another dispatcher has the store, or it or its settings cannot be read at the
            start; later, trouble with them is logged and waited for.
    """
    claim = Claim(setup.directory, setup.engine_name)
    try:
        catalog = Catalog(JobSettings.read(setup.directory))
        with closing(setup.make_engine()) as engine:
            log.info(
                "dispatching %s on %s: %d cores, %d GPUs",
                setup.directory,
                setup.engine_name,
                len(setup.capacity.cores),
                len(setup.capacity.gpus),
            )
            _Loop(setup, engine, catalog, told).run()
    finally:
        claim.close()


class _Loop:
    """Calls the dispatcher when something has changed, and now and then."""

    def __init__(
        self, setup: Setup, engine: Engine, catalog: Catalog, told: threading.Event
    ) -> None:
        self._setup = setup
        self._engine = engine
        self._settings = catalog.settings
        self._files = RunFiles(setup.directory, catalog, setup.models)
        self._told = told
        self._since = time.time()
        self._trouble = ""
        self._open()

    def _open(self) -> None:
        setup, slots = self._setup, self._settings.slots
        self._store = Store(setup.directory)
        self._ledger = Ledger(self._store)
        self._dispatcher = Dispatcher(
            self._ledger,
            self._engine,
            self._files,
            setup.capacity,
            Sharing(
                aging_s=slots.aging_s,
                patience_s=slots.patience_s,
                cores_per_owner=self._settings.limits.running_cores,
            ),
            attempt=lambda job: attempt_of(setup.directory, job),
        )

    def run(self) -> None:
        """Dispatch until told to end."""
        changes, due, alive, tidied = -1, 0.0, 0.0, 0.0
        while not self._told.is_set():
            try:
                now = time.monotonic()
                if now >= alive and self._store.database.is_replaced():
                    log.warning("another file has taken the place of %s", self._store.database.file)
                    self._store.close()
                    self._open()
                    changes = -1
                if now >= alive:
                    self._ledger.say_alive(self._about())
                    alive = now + _ALIVE_S
                if now >= tidied + _RETENTION_S:
                    tidied = now  # first, or what it cannot do would keep all else from being done
                    tidy(self._ledger, self._setup.directory, self._settings.retention, time.time())
                if (seen := self._store.database.changes()) != changes or now >= due:
                    changes = seen
                    has_more = self._dispatcher.step()
                    is_active = bool(self._ledger.active_count())
                    pause_s = 0.0 if has_more else _ACTIVE_S if is_active else _IDLE_S
                    due = time.monotonic() + pause_s
                if self._trouble:
                    log.info("the store is in order again")
                    self._trouble = ""
                self._told.wait(_TICK_S)
            except (JobStoreError, OSError) as error:
                # A full disk, most likely: jobs go on, and their states are written later.
                if str(error) != self._trouble:
                    log.error("%s; trying again", error)
                    self._trouble = str(error)
                self._told.wait(_TROUBLE_S)
        self._store.close()

    def _about(self) -> DispatcherInfo:
        free = self._dispatcher.free()
        capacity = self._setup.capacity
        return DispatcherInfo(
            pid=os.getpid(),
            host=platform.node(),
            engine=self._setup.engine_name,
            cores=len(capacity.cores),
            gpus=len(capacity.gpus),
            free_cores=len(free.cores),
            free_gpus=len(free.gpus),
            since=self._since,
            seen=time.time(),
        )


def attempt_of(directory: Path, job: Job) -> Attempt:
    """Return a job's last attempt, as engines know it.

    Args:
        directory: of the store.
        job: of which it is.
    """
    return Attempt(
        job=job.id,
        number=job.attempt,
        directory=Workspace.of_job(directory.resolve(), job.id).directory,
        cores=tuple(job.placement.get("cores", ())),
        gpus=tuple(job.placement.get("gpus", ())),
        nproc=job.spec.nproc,
        cores_wanted=job.cores,
        gpus_wanted=job.gpus,
        handle=job.handle,
        array=job.placement.get("array", ""),
        task=job.placement.get("task", 0),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="syncbn-dispatch",
        description="Start the training jobs of a store, as far as there are cores and GPUs, and "
        "watch them. There is one dispatcher for a store; jobs outlive it.",
    )
    parser.add_argument("directory", type=Path, help="the store, as syncbn-serve --jobs names it")
    parser.add_argument("--models", type=Path, help="where models are published")
    parser.add_argument(
        "--cores",
        type=_positive,
        help="how many cores jobs get at a time; default: all of this process, or of the cluster",
    )
    parser.add_argument(
        "--gpus",
        type=_count,
        help="how many GPUs jobs get; default: all of this machine; on a cluster, how many ranks a "
        "job may have that gets GPUs without asking for them, default: 0",
    )
    parser.add_argument(
        "--oversubscribe",
        action="store_true",
        help="let --cores be more than there are; jobs share them then",
    )
    parser.add_argument(
        "--jobs-per-gpu", type=_positive, default=1, help="how many jobs share a GPU; default: 1"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="where jobs run; default: local"
    )
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end when standard input is closed"
    )
    slurm = parser.add_argument_group(
        "--engine slurm",
        "Each job is one of Slurm's, which decides where and when it runs. All machines see the "
        "store at the same path. More is set in the store's settings.toml, in [cluster].",
    )
    slurm.add_argument("--slurm-partition", metavar="NAME", help="default: Slurm's own")
    slurm.add_argument("--slurm-account", metavar="NAME", help="default: Slurm's own")
    slurm.add_argument(
        "--slurm-time",
        metavar="TIME",
        help="how long a job may run at a time, as sbatch has it; after that it goes on with "
        "another attempt; default: Slurm's own",
    )
    ray = parser.add_argument_group(
        "--engine ray",
        "Each job is a Ray Job. All machines see the store at the same path, and have syncbn. A "
        "token, if the cluster wants one, is read from the variable RAY_AUTH_TOKEN. More is set in "
        "settings.toml, in [cluster].",
    )
    ray.add_argument(
        "--ray-address",
        metavar="URL",
        default=os.environ.get("RAY_ADDRESS"),
        help="of the head's dashboard, as http://HOST:8265; default: the variable RAY_ADDRESS",
    )
    return parser


def _setup(options: argparse.Namespace) -> Setup:
    if options.engine == "local":
        capacity = _capacity_of_this_machine(options)
    else:
        cores, gpus = range(options.cores or 0), range(options.gpus or 0)
        capacity = Capacity(tuple(cores), tuple(gpus), options.jobs_per_gpu)
    return Setup(
        directory=options.directory,
        models=_models(options.models),
        capacity=capacity,
        engine_name=options.engine,
        make_engine=lambda: _engine(options),
    )


def _capacity_of_this_machine(options: argparse.Namespace) -> Capacity:
    cores = sorted(os.sched_getaffinity(0))
    wanted = len(cores) if options.cores is None else options.cores
    if wanted > len(cores) and not options.oversubscribe:
        raise JobError(
            f"--cores {wanted}: this process may use {len(cores)}; give at most so many, or add "
            "--oversubscribe to have jobs share them"
        )
    gpus = _gpus() if options.gpus is None else list(range(options.gpus))
    return Capacity(tuple(islice(cycle(cores), wanted)), tuple(gpus), options.jobs_per_gpu)


def _models(directory: Path | None) -> Path | None:
    """Return where models are published, unless it is a single bundle, which is served as it is."""
    if directory is not None and (directory / MANIFEST_FILE).is_file():
        log.warning("%s is one bundle, so that nothing can be published there", directory)
        return None
    return directory


def _engine(options: argparse.Namespace) -> Engine:
    environment = environment_for_jobs(os.environ)
    cluster = JobSettings.read(options.directory).cluster
    if options.engine == "slurm":
        slurm = SlurmOptions(
            partition=options.slurm_partition,
            account=options.slurm_account,
            time=options.slurm_time,
            python=cluster.python or sys.executable,
            ranks_per_node=cluster.ranks_per_node,
            arguments=tuple(cluster.sbatch),
        )
        return SlurmEngine.of_machine(slurm, environment)
    if options.engine == "ray":
        if options.ray_address is None:
            raise JobError(
                "--engine ray: say where the head of the cluster is, with --ray-address "
                "http://HOST:8265 or the variable RAY_ADDRESS"
            )
        ray = RayOptions(
            store=options.directory.resolve(),
            environment=environment,
            python=cluster.python or sys.executable,
            ranks_per_node=cluster.ranks_per_node,
        )
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        return RayEngine(ray, HttpServer(options.ray_address, token, RAY_TIMEOUT_S))
    from syncbn.jobs.engines.local import LocalEngine

    return LocalEngine(environment)


def _gpus() -> list[int]:
    """Return the GPUs of this machine, as the driver lists them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(each) for each in visible.split(",") if each.strip().isdigit()]
    try:
        return list(range(len(list(Path("/proc/driver/nvidia/gpus").iterdir()))))
    except OSError:
        return []


def _positive(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
    return int(text)


def _wait_for_end(told: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    told.set()


if __name__ == "__main__":
    main()
