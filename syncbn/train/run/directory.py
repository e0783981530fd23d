"""The directory of one run: its resolved config, metrics, log, checkpoints, result and bundle.

Only rank 0 writes here, and whoever started it before and after it.
"""

import dataclasses
import json
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from syncbn.errors import ConfigError
from syncbn.train.config import differences, from_yaml, to_yaml
from syncbn.train.schema import PLACES, TrainConfig

# A predecessor that was told to end may hold the lock for a moment.
_LOCK_TIMEOUT_S = 5


@dataclass(frozen=True)
class Result:
    """How an attempt at a run ended.

    Attributes:
        status: "finished", "failed" or "interrupted".
        error: why, in words; None where it finished.
        metrics: those of the best epoch; empty where there is none.
        duration_s: seconds that this attempt took.
        exit_code: of the processes: 0, 1, 2 for a wrong configuration, 128 + a signal's number.
        evaluations: how good the exported model is: a split, the number of its samples, whether the
            statistics are as trained or recalibrated, and metrics with their 95 % intervals.
        objective: what a sweep minimizes: the validation error of the best epoch; None if the run
            did not finish, or is one of an earlier version.
    """

    status: str
    error: str | None
    metrics: dict[str, float]
    duration_s: float
    exit_code: int
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    objective: float | None = None


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run's files."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

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
        return self.path / "result.json"

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
        try:
            return from_yaml(self.config_file.read_text())
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"cannot read {self.config_file}: {error}") from error

    @contextmanager
    def lock(self) -> Generator[None]:
        """Keep every other job out of this directory, until the end or this process's death.

        Raises:
            ConfigError: another job is in it.
        """
        held = FileLock(self.path / ".lock")
        try:
            held.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout:
            raise ConfigError(
                f"another job is training in {self.path}; wait for its end, or choose another "
                "run_dir"
            ) from None
        with held:
            yield

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the metrics of the epochs so far, oldest first."""
        return _read_lines(self.metrics_file)

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add one epoch's metrics, in one write that reaches the file before it returns."""
        _append_line(self.metrics_file, metrics)

    def append_step(self, metrics: Mapping[str, float]) -> None:
        """Add what was measured at one step, likewise."""
        _append_line(self.steps_file, metrics)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run will produce again."""
        for file in (self.metrics_file, self.steps_file):
            kept = [line for line in _read_lines(file) if line["step"] <= step]
            _replace(file, "".join(json.dumps(line) + "\n" for line in kept))

    def read_result(self) -> Result | None:
        """Return how the last attempt ended, or None where none has ended in an orderly way."""
        try:
            return Result(**json.loads(self.result_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_result(self, result: Result) -> None:
        """Say how an attempt ended; a reader sees all of it or nothing."""
        _replace(self.result_file, json.dumps(dataclasses.asdict(result)) + "\n")

    def tracker_id(self) -> str:
        """Return the name under which trackers know this run, the same for each attempt at it."""
        file = self.path / "tracker_id"
        if not file.exists():
            _replace(file, secrets.token_hex(8))
        return file.read_text()


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    # The last line may have been cut short by a kill, and then says nothing.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def _append_line(file: Path, values: Mapping[str, float]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(values) + "\n")


def _replace(file: Path, content: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def open_run_directory(config: TrainConfig, started_by: str | None = None) -> RunDirectory:
    """Make the directory of a new run and write its config, or open that of a run to resume.

    A directory named by `config.run_dir` that exists is resumed if it belongs to the same job and
    did not finish. Without that name, a new one is made below `config.run_root`: no two runs get
    the same, however many start at once.

    Args:
        config: the job.
        started_by: who starts it. A second call for the same starter, which is a restart, opens
            the directory of the first.

    Raises:
        ConfigError: the directory belongs to another job, or its run has finished, or it cannot be
            made, or `config.publish` is not to be written to.
    """
    if config.publish is not None:
        _check_publishable(Path(config.publish), config.name)
    path = Path(config.run_dir or _restarted(config, started_by) or _fresh_name(config))
    run = RunDirectory(path.resolve())
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        if run.path.exists():
            _check_resumable(run, config)
            run.result_file.unlink(missing_ok=True)
        else:
            run.path.mkdir()
        _replace(run.config_file, to_yaml(config))
        if started_by is not None:
            _replace(run.path / _STARTER, started_by)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {run.path}: {error.strerror}") from error
    return run


def _check_publishable(directory: Path, name: str) -> None:
    """Raise where nothing could be published, which is better known before training."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"publish={directory}: cannot be made: {error.strerror}") from error
    model = directory / name
    if model.exists() and not model.is_dir():
        raise ConfigError(f"publish={directory}: {name} in it is no directory")
    if not os.access(model if model.exists() else directory, os.W_OK | os.X_OK):
        raise ConfigError(f"publish={directory}: cannot be written to by this user")


_STARTER = ".started_by"


def _restarted(config: TrainConfig, started_by: str | None) -> Path | None:
    for file in Path(config.run_root).glob(f"*/{_STARTER}"):
        if file.read_text() == started_by:
            return file.parent
    return None


def _fresh_name(config: TrainConfig) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    name = f"{stamp}-{config.name}-{config.norm.name}-{secrets.token_hex(3)}"
    return Path(config.run_root) / name


def _check_resumable(run: RunDirectory, config: TrainConfig) -> None:
    if not run.config_file.is_file():
        if not any(run.path.iterdir()):
            return
        raise ConfigError(
            f"run_dir={run.path} exists and is not a run directory; choose one that does not exist"
        )
    result = run.read_result()
    if result is not None and result.status == "finished":
        raise ConfigError(f"run_dir={run.path} holds a finished run; choose another directory")
    # Who trains and who is told are no part of the job either.
    same = {key: getattr(config, key) for key in PLACES}
    same |= {"launch": config.launch, "track": config.track}
    theirs = dataclasses.replace(run.read_config(), **same)
    if theirs != config:
        differing = differences(config, theirs) or differences(theirs, config)
        raise ConfigError(
            f"run_dir={run.path} belongs to a job with another configuration; this one has "
            f"{', '.join(differing)}; choose another directory"
        )
