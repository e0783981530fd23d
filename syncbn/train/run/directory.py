"""The directory of one run: its resolved config, metrics, log, checkpoints, result and bundle.

Only rank 0 writes here, and whoever started it before and after it.
"""

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from syncbn.errors import ConfigError
from syncbn.train.changes import CONFIG_FILE, check_changes, read_config, resumed_config
from syncbn.train.config import to_yaml
from syncbn.train.run.attempts import (
    ATTEMPTS_FILE,
    begin_attempt,
    completed,
    keep_attempt,
    note_restart,
    read_attempts,
)
from syncbn.train.run.files import append_line, read_lines, replace_file
from syncbn.train.run.lock import LOCK_FILE, RunLock, lock_directory
from syncbn.train.run.publish import whole_bundle
from syncbn.train.run.result import RESULT_FILE, Result, best_of, read_result, write_result
from syncbn.train.run.status import Status, read_status
from syncbn.train.schema import TrainConfig


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run's files."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line and epoch."""
        return self.path / "metrics.jsonl"

    @property
    def steps_file(self) -> Path:
        """One JSON object a line, every few optimizer steps."""
        return self.path / "steps.jsonl"

    @property
    def result_file(self) -> Path:
        """How the last attempt ended; not there while one is under way."""
        return self.path / RESULT_FILE

    @property
    def log_file(self) -> Path:
        """What rank 0 logged."""
        return self.path / "run.log"

    @property
    def checkpoints_dir(self) -> Path:
        """The newest states, and the best."""
        return self.path / "checkpoints"

    @property
    def bundle_dir(self) -> Path:
        """The exported model; there once the run is finished."""
        return self.path / "bundle"

    def read_config(self) -> TrainConfig:
        """Return the resolved configuration.

        Raises:
            ConfigError: there is none, or it does not follow the schemas.
        """
        return read_config(self.config_file)

    def lock(self) -> RunLock:
        """Keep every other job out of this directory, until all who share the lock have ended.

        Raises:
            ConfigError: another job is in it.
        """
        return lock_directory(self.path)

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the metrics of the epochs so far, oldest first."""
        return read_lines(self.metrics_file)

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add one epoch's metrics, in one write that reaches the file before it returns."""
        append_line(self.metrics_file, metrics)

    def append_step(self, metrics: Mapping[str, float]) -> None:
        """Add what was measured at one step, likewise."""
        append_line(self.steps_file, metrics)

    def forget_after(self, step: int, epochs: int) -> None:
        """Drop the lines of later steps and epochs, which a resumed run will produce again.

        Args:
            step: the steps that are done.
            epochs: the epochs that have ended. The last step of one may be done, and its metrics
                written, when a kill comes before the checkpoint of its end.
        """
        for file, ended in ((self.metrics_file, epochs), (self.steps_file, math.inf)):
            kept = [
                line
                for line in read_lines(file)
                if line["step"] <= step and line.get("epoch", 0) <= ended
            ]
            replace_file(file, "".join(json.dumps(line) + "\n" for line in kept))

    def read_result(self) -> Result | None:
        """Return how the last attempt ended, or None where none has ended in an orderly way."""
        return read_result(self.path)

    def write_result(self, result: Result) -> Result:
        """Say how an attempt ended; a reader sees all of it or nothing.

        Returns:
            The result with what it did not say: its reason, the attempt's number and times, how
            long it took, and the metrics of the best epoch.
        """
        metrics = result.metrics or best_of(self.read_metrics())
        result = completed(self.path, dataclasses.replace(result, metrics=metrics))
        write_result(self.path, result)
        return result

    def read_status(self) -> dict[str, Any] | None:
        """Return how far the last attempt is or was, or None where that is not known."""
        status = read_status(self.path)
        return None if status is None else dataclasses.asdict(status)

    def read_attempts(self) -> list[Result]:
        """Return how the attempts ended, in their order, without one that is under way."""
        return read_attempts(self.path)

    def keep_attempt(self) -> None:
        """Put what the last attempt left with the attempts before it, and away.

        A kill at any moment leaves it in one of both places, or in both, which counts once.

        Raises:
            OSError: it cannot be written; nothing is lost.
        """
        keep_attempt(self.path, best_of(self.read_metrics()))

    def begin_attempt(self, epochs: int) -> Status:
        """Keep what an attempt before this one left, and say that one begins now.

        Called under the lock, by who starts the ranks; a rank that is started again goes on with
        the same attempt.

        Args:
            epochs: of the whole run.

        Raises:
            OSError: what was left cannot be kept.
        """
        self.keep_attempt()
        return begin_attempt(self.path, epochs)

    def note_restart(self) -> None:
        """Say that all ranks of the attempt that is under way are started again."""
        note_restart(self.path)

    def tracker_id(self) -> str:
        """Return the name under which trackers know this run, the same for each attempt at it."""
        file = self.path / "tracker_id"
        if not file.exists():
            replace_file(file, secrets.token_hex(8))
        return file.read_text()


@dataclass(frozen=True)
class OpenRun:
    """A run directory that is ready for a job, and that no other job can get.

    Attributes:
        directory: where it is; its config.yaml is `config`.
        config: the job: of a run that goes on, its own configuration with what was typed.
        changes: what in it is another than before, "key=value (was old)" each.
        lock: what keeps others out, until it is closed by all who share it.
    """

    directory: RunDirectory
    config: TrainConfig
    changes: tuple[str, ...]
    lock: RunLock

    def __enter__(self) -> "OpenRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.close()


def open_run(
    config: TrainConfig,
    overrides: Sequence[str] | None = None,
    started_by: str | None = None,
    check: Callable[[], None] | None = None,
) -> OpenRun:
    """Make the directory of a new run and write its config, or open that of a run that goes on.

    A directory named by `config.run_dir` that exists goes on, with its own configuration and the
    overrides laid over it. Without that name, a new one is made below `config.run_root`: no two
    runs get the same, however many start at once. Nothing in a directory is touched unless this
    job has its lock.

    Args:
        config: the job.
        overrides: what of it was typed, as on the command line; None: all of it.
        started_by: who starts it. A second call for the same starter, which is a restart, opens
            the directory of the first.
        check: called with the lock and before anything is written; raises if it must not be.

    Raises:
        ConfigError: another job is in the directory, or it is no run's, or its run cannot go on
            with what was typed, or has finished and there is nothing to add, or the directory
            cannot be made, or `config.publish` is not to be written to.
    """
    fresh = _fresh_name(config).resolve()
    path = Path(config.run_dir or _restarted(config, started_by) or fresh)
    run = RunDirectory(path.resolve())
    with ExitStack() as opened:
        try:
            if config.publish is not None:
                _check_publishable(Path(config.publish), config.name)
            _check_free(run)
            run.path.mkdir(parents=True, exist_ok=run.path != fresh)
            lock = opened.enter_context(run.lock())
            _check_free(run)  # again, as nobody else writes from now on
            if check is not None:
                check()
            changes: list[str] = []
            if run.config_file.exists():
                stored = run.read_config()
                if overrides is not None:
                    resumed = resumed_config(stored, overrides, config)
                    resumed.run_dir = config.run_dir or resumed.run_dir
                    config = resumed
                changes = _check_resumable(run, stored, config)
            run.keep_attempt()
            replace_file(run.config_file, to_yaml(config))
            if started_by is not None:
                replace_file(run.path / _STARTER, started_by)
            _note(run, changes)
        except OSError as error:
            raise ConfigError(
                f"cannot make the run directory {run.path}: {error.strerror}"
            ) from error
        opened.pop_all()
    return OpenRun(run, config, tuple(changes), lock)


def is_more(run: RunDirectory, config: TrainConfig, overrides: Sequence[str]) -> bool:
    """Return whether what was typed has a finished run train, export or publish once more.

    Args:
        run: its directory.
        config: what the overrides give for a new run.
        overrides: what was typed.

    Raises:
        ConfigError: the run's configuration cannot be read.
    """
    stored = run.read_config()
    return _adds(run, stored, resumed_config(stored, overrides, config))


def open_run_directory(config: TrainConfig) -> RunDirectory:
    """Make or open a run directory as `open_run` does, without keeping others out afterwards.

    For one process that trains by itself, as tests and benchmarks do.

    Raises:
        ConfigError: as `open_run`.
    """
    opened = open_run(config)
    opened.lock.close()
    return opened.directory


def _check_publishable(directory: Path, name: str) -> None:
    """Raise where nothing could be published, which is better known before training."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"publish={directory}: cannot be made: {error.strerror}") from error
    model = directory / name
    if model.exists() and not model.is_dir():
        raise ConfigError(f"publish={directory}: {name} in it is no directory")
    if (why := whole_bundle(directory, name)) is not None:
        raise ConfigError(f"publish={directory}: {why}")
    if not os.access(model if model.exists() else directory, os.W_OK | os.X_OK):
        raise ConfigError(f"publish={directory}: cannot be written to by this user")


_STARTER = ".started_by"
# What a job may have left that was killed before it wrote its configuration, or refused.
_OURS = (LOCK_FILE, _STARTER, f"{CONFIG_FILE}.tmp", RESULT_FILE, ATTEMPTS_FILE)


def _restarted(config: TrainConfig, started_by: str | None) -> Path | None:
    for file in Path(config.run_root).glob(f"*/{_STARTER}"):
        if file.read_text() == started_by:
            return file.parent
    return None


def _fresh_name(config: TrainConfig) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    name = f"{stamp}-{config.name}-{config.norm.name}-{secrets.token_hex(3)}"
    return Path(config.run_root) / name


def _check_free(run: RunDirectory) -> None:
    """Raise if a directory is there that is neither empty nor a run's."""
    if run.config_file.is_file() or not run.path.exists():
        return
    if any(file.name not in _OURS for file in run.path.iterdir()):
        raise ConfigError(
            f"run_dir={run.path} exists and is not a run directory; choose one that does not exist"
        )


def _check_resumable(run: RunDirectory, stored: TrainConfig, config: TrainConfig) -> list[str]:
    """Return what changes in a run that goes on; raise if it cannot."""
    changes = check_changes(run.path, stored, config)
    result = run.read_result()
    if result is None or result.status != "finished" or _adds(run, stored, config):
        return changes
    raise ConfigError(
        f"run_dir={run.path} holds a finished run; choose another directory, or say what to add: "
        f"more than {_what_ended(run, stored)}, or another publish or recalibrate"
    )


def _adds(run: RunDirectory, stored: TrainConfig, config: TrainConfig) -> bool:
    """Return whether a configuration has a finished run train, export or publish once more."""
    if config.recalibrate != stored.recalibrate:
        return True
    if config.publish not in (None, stored.publish):
        return True
    epochs, steps, in_vain = _progress(run, stored)
    if config.max_steps is not None and config.max_steps <= steps:
        return False
    if config.patience is not None and in_vain >= config.patience:
        return False
    was_cut = stored.max_steps is not None and stored.max_steps <= steps
    if was_cut or config.patience != stored.patience:  # which may have ended it
        return config.epochs > epochs
    return config.epochs > max(epochs, stored.epochs)


def _progress(run: RunDirectory, stored: TrainConfig) -> tuple[float, float, float]:
    """Return how many epochs and steps a run has made, and how many epochs since the best one."""
    lines = run.read_metrics()
    last = lines[-1] if lines else {}
    epochs, steps = last.get("epoch", stored.epochs), last.get("step", 0)
    best = max((line.get("epoch", 0) for line in lines if line.get("best")), default=epochs)
    return epochs, steps, epochs - best


def _what_ended(run: RunDirectory, stored: TrainConfig) -> str:
    """Return the settings that ended a finished run, of which more is needed to go on."""
    epochs, steps, in_vain = _progress(run, stored)
    if stored.patience is not None and in_vain >= stored.patience:
        return f"patience={stored.patience}"
    if stored.max_steps is None or stored.max_steps > steps:
        return f"epochs={stored.epochs}"
    if epochs < stored.epochs:
        return f"max_steps={stored.max_steps}"
    return f"both epochs={stored.epochs} and max_steps={stored.max_steps}"


def _note(run: RunDirectory, changes: Sequence[str]) -> None:
    """Add to a run's log with what it goes on."""
    if changes:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
        with run.log_file.open("a") as stream:
            stream.write(f"{stamp} INFO going on with {', '.join(changes)}\n")
