"""The directory of one run: its resolved config, metrics, log, checkpoint and bundle.

Only rank 0 writes here.
"""

import dataclasses
import json
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from syncbn.errors import ConfigError
from syncbn.train.config import TrainConfig, differences, from_yaml, to_yaml


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
    def log_file(self) -> Path:
        """What rank 0 logged."""
        return self.path / "run.log"

    @property
    def checkpoint_file(self) -> Path:
        """The state after the last whole epoch."""
        return self.path / "checkpoint.pt"

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
            held.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"another job is training in {self.path}; wait for its end, or choose another "
                "run_dir"
            ) from None
        with held:
            yield

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the metrics of the epochs so far, oldest first."""
        if not self.metrics_file.exists():
            return []
        # The last line may have been cut short by a kill, and then says nothing.
        lines = self.metrics_file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add one epoch's metrics, in one write that reaches the file before it returns."""
        with self.metrics_file.open("a") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the metrics of later epochs, which a resumed run will produce again."""
        kept = [line for line in self.read_metrics() if line["epoch"] <= epoch]
        temporary = self.metrics_file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.metrics_file)


def open_run_directory(config: TrainConfig) -> RunDirectory:
    """Make the directory of a new run and write its config, or open that of a run to resume.

    A directory named by `config.run_dir` that exists is resumed if it belongs to the same job and
    did not finish. Without that name, a new one is made below `config.run_root`: no two runs get
    the same, however many start at once.

    Raises:
        ConfigError: the directory belongs to another job, or its run has finished, or it cannot be
            made.
    """
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    fresh = (
        Path(config.run_root) / f"{stamp}-{config.name}-{config.norm.name}-{secrets.token_hex(3)}"
    )
    run = RunDirectory(Path(config.run_dir or fresh).resolve())
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        if run.path.exists():
            _check_resumable(run, config)
        else:
            run.path.mkdir()
            run.config_file.write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {run.path}: {error.strerror}") from error
    return run


def _check_resumable(run: RunDirectory, config: TrainConfig) -> None:
    if not run.config_file.is_file():
        raise ConfigError(
            f"run_dir={run.path} exists and is not a run directory; choose one that does not exist"
        )
    if run.bundle_dir.exists():
        raise ConfigError(f"run_dir={run.path} holds a finished run; choose another directory")
    # Where the directory lies is no part of the job: it may be named in several ways, or moved.
    same_place = {"run_dir": config.run_dir, "run_root": config.run_root}
    theirs = dataclasses.replace(run.read_config(), **same_place)
    if theirs != config:
        differing = differences(config, theirs) or differences(theirs, config)
        raise ConfigError(
            f"run_dir={run.path} belongs to a job with another configuration; this one has "
            f"{', '.join(differing)}; choose another directory"
        )
