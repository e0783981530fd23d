"""Telling others about a run; a tracker that fails costs its own records, never the run."""

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from syncbn.train.run.directory import RunDirectory
from syncbn.train.schema import TrainConfig, WandbConfig, WandbMode

log = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 30
_FINISH_TIMEOUT_S = 60
# For a tracker that has not even started when the run ends.
_LATE_TIMEOUT_S = 5


class Tracker(Protocol):
    """Receives what a run measures; none of its methods raises, or waits for a network."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at an optimizer step."""
        ...

    def finish(self, bundle: Path | None) -> None:
        """Say that no more will come, and what came out; waits a limited time for the rest."""
        ...


class NoTracker:
    """Records nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self, bundle: Path | None) -> None:
        """Do nothing."""


class WandbTracker:
    """Records in a Weights & Biases run, from a thread of its own that may wait for the network.

    Args:
        config: the whole job, which is recorded too.
        track: how to record it.
        run: its directory.
    """

    def __init__(self, config: TrainConfig, track: WandbConfig, run: RunDirectory) -> None:
        self._track = track
        self._settings: dict[str, Any] = {
            "project": track.project,
            "name": run.path.name,
            "dir": run.path,
            "id": run.tracker_id(),
            "group": track.group or (config.sweep_dir and Path(config.sweep_dir).name),
            "config": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
            "mode": track.mode.value,
            # Offline there is nothing to ask; the id makes the parts one run when they are synced.
            "resume": "allow" if track.mode is WandbMode.online else None,
        }
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | Path | None]
        self._queue = queue.SimpleQueue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at an optimizer step."""
        self._queue.put((step, dict(metrics)))

    def finish(self, bundle: Path | None) -> None:
        """Say that no more will come; online, with the bundle as an artifact."""
        if bundle is not None and self._track.mode is WandbMode.online:
            self._queue.put(bundle)
        self._queue.put(None)
        self._thread.join(_FINISH_TIMEOUT_S if self._started.is_set() else _LATE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning(
                "wandb has not finished in time; `wandb sync` can upload what it wrote to disk"
            )

    def _work(self) -> None:
        try:
            import wandb  # takes a second and starts threads: only where it is wanted

            settings = wandb.Settings(silent=True, console="off", init_timeout=_INIT_TIMEOUT_S)
            run: Any = wandb.init(**self._settings, settings=settings)
            self._started.set()
            log.info("wandb (%s) records in %s", self._track.mode.value, Path(run.dir).parent)
            while (item := self._queue.get()) is not None:
                if isinstance(item, Path):
                    artifact = wandb.Artifact(self._settings["config"]["name"], type="model")
                    artifact.add_dir(str(item))
                    run.log_artifact(artifact)
                else:
                    step, metrics = item
                    run.log(metrics, step=step)
            run.finish()
        except Exception as error:  # wandb raises of many kinds; see the module's promise
            log.warning("wandb failed, the run goes on without it: %s", error)


def start_tracker(config: TrainConfig, run: RunDirectory) -> Tracker:
    """Return the configured tracker."""
    if not isinstance(config.track, WandbConfig) or config.track.mode is WandbMode.disabled:
        return NoTracker()
    return WandbTracker(config, config.track, run)
