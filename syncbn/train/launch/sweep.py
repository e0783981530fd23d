"""Sweeps: many jobs in one directory, of which one that fails takes no other with it."""

import hashlib
import json
import os
import platform
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.config import to_config
from syncbn.train.launch.client import ForkServer
from syncbn.train.launch.composed import composing_once
from syncbn.train.launch.refused import setting_aside
from syncbn.train.run.directory import OpenRun, Result, RunDirectory, is_more, open_run
from syncbn.train.run.reasons import reason_of

_NAME_LIMIT = 120
# Tells jobs, wherever a launcher starts them, which lock the sweep's own process holds on which
# host, and what all jobs have in common.
_VARIABLE = "SYNCBN_SWEEP"


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for a sweep."""
    return any(argument in ("-m", "--multirun") for argument in arguments)


def sweep(arguments: list[str], run_jobs: Callable[[], None], server: ForkServer) -> int:
    """Run the jobs of a sweep, say how they ended, and return the exit code: 1 unless all finished.

    Args:
        arguments: the command line, to which the sweep's directory is added: it must be there,
            because every job composes its configuration anew.
        run_jobs: calls `be_sweep_job` for each job, in whatever process.
        server: forks the jobs, in whatever process of this host they are launched.

    Raises:
        ConfigError: another sweep is under way in the directory.
        HydraException, OmegaConfBaseException: the command line is wrong.
        SystemExit: a signal stopped it.
    """
    directory = _named(arguments)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another sweep is under way in {directory}; wait for its end, or choose another "
            "sweep_dir"
        ) from None
    about = {"host": platform.node(), "lock": str(directory.resolve() / ".lock")}
    os.environ[_VARIABLE] = json.dumps(about | {"common": arguments})
    trouble = ""
    with lock:
        for number in (signal.SIGTERM, signal.SIGHUP):  # some launchers leave their jobs otherwise
            signal.signal(number, _exit_on_signal)

        def refuse(overrides: list[str], error: ConfigError) -> None:
            _refuse(_run_of(directory, overrides), error, time.monotonic())

        try:
            server.share()
            with setting_aside(refuse), composing_once():
                run_jobs()
        except (HydraException, OmegaConfBaseException):
            _discard_if_empty(directory)
            raise
        except Exception as error:  # a launcher's, for a job whose process it lost
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return _finish(directory, trouble)


def be_sweep_job(composed: DictConfig, launch: Callable[[OpenRun], Result]) -> float | None:
    """Train one job of a sweep, unless it has finished; return its validation error.

    Whatever goes wrong is in the job's result.json, for an exception would be in a launcher's
    words, and under some launchers the end of the other jobs.

    Returns:
        1 − the validation accuracy, or what the task has in its place; None if the job failed,
        which a sweeper takes for a failure.
    """
    settings = HydraConfig.get()
    overrides = _as_typed(settings.overrides.task)
    run = _run_of(Path(settings.sweep.dir), overrides)
    name, result = run.path.name, run.read_result()
    started = time.monotonic()
    try:
        composed.run_dir = str(Path(settings.sweep.dir) / name)
        config = to_config(composed)
        if result is None or result.status != "finished" or is_more(run, config, overrides):
            print(f"{name}: starting", flush=True)
            with open_run(config, overrides) as opened:
                result = launch(opened)
    except Exception as error:
        return _refuse(run, error, started)
    print(f"{name}: {result.status}", flush=True)
    return result.objective if result.status == "finished" else None


def _as_typed(overrides: Sequence[str]) -> list[str]:
    """Return overrides without what Hydra has put before some of their characters."""
    return [override.replace("\\", "") for override in overrides]


def _run_of(directory: Path, overrides: Sequence[str]) -> RunDirectory:
    """Return where a job of a sweep is, by the overrides that it does not share with all others."""
    common: list[str] = _about_sweep().get("common", [])
    chosen = [override for override in _as_typed(overrides) if override not in common]
    return RunDirectory((directory / job_name(chosen)).resolve())


def _refuse(run: RunDirectory, error: Exception, started: float) -> None:
    """Say why a job did not begin, and record it, unless it finished or another job is there."""
    why = str(error) if isinstance(error, SyncBNError) else repr(error)
    result = Result("failed", why, {}, time.monotonic() - started, 1, reason=reason_of(error))
    print(f"syncbn-train: {run.path.name}: {why}", file=sys.stderr)
    if not _is_finished(run.read_result()):  # of which the model is there
        run.path.mkdir(parents=True, exist_ok=True)
        with suppress(ConfigError), run.lock():
            run.keep_attempt()
            run.write_result(result)
    print(f"{run.path.name}: failed", flush=True)


def is_abandoned() -> bool:
    """Return whether this process works for a sweep whose own process is gone from this host.

    Some launchers leave their jobs behind when they are killed.
    """
    about = _about_sweep()
    if about.get("host") != platform.node() or not Path(about["lock"]).exists():
        return False
    held = FileLock(about["lock"])
    try:
        held.acquire(timeout=0)
    except Timeout:
        return False
    held.release()
    return True


def job_name(overrides: list[str]) -> str:
    """Return a directory name for the overrides that tell a job from the others of its sweep."""
    text = ",".join(sorted(overrides)) or "defaults"
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if name == text and len(name) <= _NAME_LIMIT:
        return name
    return f"{name[:_NAME_LIMIT]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _about_sweep() -> dict[str, Any]:
    return json.loads(os.environ.get(_VARIABLE, "{}"))


def _named(arguments: list[str]) -> Path:
    pairs = (argument.partition("=") for argument in arguments)
    values = {key: value for key, _, value in pairs}
    if "sweep_dir" in values:
        return Path(values["sweep_dir"])
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    path = Path(values.get("run_root", "runs")) / f"{stamp}-sweep-{secrets.token_hex(3)}"
    arguments.append(f"sweep_dir={path}")
    return path


def _discard_if_empty(directory: Path) -> None:
    """Remove what a sweep without a job leaves: our lock, and Hydra's record of the sweep."""
    if any(path.is_dir() for path in directory.iterdir()):
        return
    for name in (".lock", "multirun.yaml"):
        (directory / name).unlink(missing_ok=True)
    for path in (directory, directory.parent):
        if not any(path.iterdir()):
            with suppress(OSError):  # "." cannot be removed
                path.rmdir()


def _finish(directory: Path, trouble: str) -> int:
    results = {
        path.name: RunDirectory(path).read_result()
        for path in sorted(directory.iterdir())
        if (path / "config.yaml").exists() or (path / "result.json").exists()
    }
    failed = {name: result for name, result in results.items() if not _is_finished(result)}
    print(f"\n{len(results) - len(failed)} of {len(results)} jobs finished, in {directory}")
    for name, result in failed.items():
        how = f"{result.status}{_because(result)}" if result else "ended without a word"
        print(f"  {name}: {how}")
    if trouble:
        print(f"syncbn-train: the launcher lost jobs: {trouble}", file=sys.stderr)
    if failed or trouble:
        print(f"The same command with sweep_dir={directory} trains what is missing.")
    print(f"syncbn-runs {directory} compares them.")
    return 1 if failed or trouble else 0


def _is_finished(result: Result | None) -> bool:
    return result is not None and result.status == "finished"


def _because(result: Result) -> str:
    return f": {result.error}" if result.error else ""


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
