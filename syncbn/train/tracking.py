"""Telling others about a run; a tracker that fails costs its own records, never the run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from syncbn.train.config import TrainConfig, WandbConfig

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives what a run measures."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at an optimizer step; never raises."""
        ...

    def finish(self) -> None:
        """Say that no more will come; never raises."""
        ...


class NoTracker:
    """Records nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbTracker:
    """Records in a Weights & Biases run, made on construction."""

    def __init__(self, config: TrainConfig, track: WandbConfig, run_dir: Path) -> None:
        import wandb  # takes a second and starts threads: only where it is wanted

        self._run: Any = wandb.init(
            project=track.project,
            name=run_dir.name,
            dir=run_dir,
            config=OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),  # pyright: ignore[reportArgumentType] -- a dict, as the schema is one
            mode=track.mode.value,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        log.info("wandb (%s) records in %s", track.mode.value, Path(self._run.dir).parent)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at an optimizer step; after a failure, warn and stop recording."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:  # wandb raises of many kinds; see the module's promise
            self._run = None
            log.warning("wandb failed, the run goes on without it: %s", error)

    def finish(self) -> None:
        """Write out what is buffered."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as in `log`
            log.warning("wandb failed to finish: %s", error)


def start_tracker(config: TrainConfig, run_dir: Path) -> Tracker:
    """Return the configured tracker; one that fails to start is warned of and left out."""
    if not isinstance(config.track, WandbConfig):
        return NoTracker()
    try:
        return WandbTracker(config, config.track, run_dir)
    except Exception as error:  # wandb raises of many kinds; see the module's promise
        log.warning("wandb failed to start, the run goes on without it: %s", error)
        return NoTracker()
