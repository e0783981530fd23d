"""Small runs of the trainer, to be called on every rank of a world."""

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import SyncBNError
from syncbn.train import export, loop
from syncbn.train.config import compose_config
from syncbn.train.loop import train
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import Result, open_run_directory
from syncbn.train.totals import DeviceTotals
from tests.support.jobs import quiet_watch
from tests.support.world import run_world

CPU = torch.device("cpu")
SMALL = ["track=none", "optim.lr=0.05", "launch.device=cpu", "log_every_steps=1", "name=run"]


def train_small(
    overrides: list[str],
    dtype: torch.dtype = torch.float32,
    late: int | None = None,
    stop_at: int | None = None,
) -> Result:
    """Train on this rank; float64 leaves a checkpoint alone, as bundles hold float32.

    Args:
        overrides: of the configuration, besides small ones.
        dtype: of the weights.
        late: if given, the number of statistics of the task, and the host learns of each step one
            step late, as on a GPU.
        stop_at: if given, the last rank is told to stop while the step after so many is made.
    """
    width = [] if any(each.startswith(_WITHOUT_WIDTH) for each in overrides) else ["model.width=4"]
    config = compose_config([*SMALL, *width, *overrides])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    is_told = stop_at is not None and dist.get_rank() == dist.get_world_size() - 1
    watch: Any = _Told(stop_at) if is_told else quiet_watch()
    torch.set_default_dtype(dtype)
    # Drawing takes as long as training a few epochs; the curves are for others to test.
    with mock.patch.object(export, "plot_curves"):
        try:
            if dtype != torch.float32:
                nothing = export.Exported({}, [])
                with mock.patch.object(loop, "export", return_value=nothing):
                    return train(config, run, CPU, watch)
            if late is not None:
                with mock.patch.object(
                    loop, "HostTotals", side_effect=lambda _: DeviceTotals(CPU, 60, late)
                ):
                    return train(config, run, CPU, watch)
            return train(config, run, CPU, watch)
        finally:
            torch.set_default_dtype(torch.float32)


class _Told:
    """A watch of a rank that is told to stop while it makes a step."""

    def __init__(self, step: int | None) -> None:
        self.stop_signal = 0
        self._step = step

    def at(self, step: int, doing: str) -> None:
        if step == self._step and doing == "in forward and backward":
            self.stop_signal = int(signal.SIGTERM)

    def moving(self, parts: Any, step: int, doing: str) -> Any:
        return iter(parts)

    def working(self, step: int, doing: str) -> Any:
        return nullcontext()


_WITHOUT_WIDTH = ("model=custom", "model=torchvision")


def explained(overrides: list[str], late: int | None = None) -> str:
    """Train on this rank, and return the kind and the text of the error it ends with, or ""."""
    try:
        train_small(overrides, late=late)
    except SyncBNError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def few_steps(run_dir: Path, world_size: int, *overrides: str) -> dict[str, Tensor]:
    """Return the weights after six steps in float64 on so many ranks.

    Six are within the warm-up: few enough for rounding not to have grown.
    """
    more = [f"run_dir={run_dir}", "max_steps=6", "data.validation=0", *overrides]
    run_world(world_size, train_small, more, torch.float64)
    return read_checkpoint(checkpoint_files(run_dir / "checkpoints")[0]).states["model"]
