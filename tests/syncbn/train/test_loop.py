import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.bundle import read_bundle
from syncbn.errors import TrainingError
from syncbn.train.checkpoint import read_checkpoint
from syncbn.train.config import compose_config
from syncbn.train.loop import train
from syncbn.train.run_directory import open_run_directory
from tests.support.tolerance import assert_as_exact
from tests.support.world import run_world

SMALL = ["track=none", "model.width=4", "optim.lr=0.05", "launch.device=cpu"]


def _train(overrides: list[str], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    torch.set_default_dtype(dtype)
    config = compose_config([*SMALL, *overrides])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    return train(config, run, torch.device("cpu"))


def _train_or_explain(overrides: list[str]) -> str:
    with pytest.raises(TrainingError) as caught:
        _train(overrides)
    return str(caught.value)


def _weights(run_dir: Path) -> dict[str, Tensor]:
    return read_checkpoint(run_dir / "checkpoint.pt").model


def _train_few_steps(
    tmp_path: Path, name: str, world_size: int, batch_size: int, dtype: torch.dtype, norm: str
) -> dict[str, Tensor]:
    run_dir = tmp_path / name
    overrides = [f"run_dir={run_dir}", f"data.batch_size={batch_size}", f"norm={norm}"]
    # Six steps within the warm-up: few enough for rounding not to have grown.
    overrides += ["max_steps=6", f"name={name}"]
    run_world(world_size, _train_in, overrides, dtype)
    return _weights(run_dir)


def _train_in(overrides: list[str], dtype: torch.dtype) -> dict[str, float]:
    from syncbn.train import loop

    if dtype != torch.float32:
        # Bundles hold float32; what is compared here is the checkpoint.
        loop.write_bundle = lambda *args: None  # pyright: ignore[reportAttributeAccessIssue] -- stands in for it
    return _train(overrides, dtype)


def test_two_ranks_with_half_the_batch_reach_the_weights_of_one(tmp_path: Path) -> None:
    runs: dict[tuple[int, torch.dtype], dict[str, Tensor]] = {
        (world_size, dtype): _train_few_steps(
            tmp_path,
            f"w{world_size}-{str(dtype)[-2:]}",
            world_size,
            16 // world_size,
            dtype,
            "sync",
        )
        for world_size in (1, 2)
        for dtype in (torch.float32, torch.float64)
    }
    truth = runs[1, torch.float64]
    for name, weights in truth.items():
        exact = runs[2, torch.float64][name]
        torch.testing.assert_close(exact, weights, rtol=1e-12, atol=1e-12)
        if weights.is_floating_point():
            ours, plain = runs[2, torch.float32][name], runs[1, torch.float32][name]
            assert_as_exact(ours, weights, plain, name)


def test_without_synchronising_two_ranks_drift_from_one(tmp_path: Path) -> None:
    one, two = (
        _train_few_steps(tmp_path, f"w{size}", size, 16 // size, torch.float64, "local")
        for size in (1, 2)
    )
    assert (one["0.weight"] - two["0.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("norm", ["sync", "local", "none"])
def test_metrics_agree_between_ranks_and_files(tmp_path: Path, norm: str) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", f"norm={norm}", "epochs=2", "optim=adamw"]
    results = run_world(2, _train, overrides)
    bundle = read_bundle(run_dir / "bundle")
    for result in results:
        assert result["epoch"] == 2
        assert result["step"] == 88
        for key in ("train_loss", "test_loss", "test_accuracy", "lr"):
            assert result[key] == results[0][key] == bundle.manifest.metrics[key]
            assert math.isfinite(result[key])
    assert results[0]["test_accuracy"] > 0.5


class _KilledError(Exception):
    """Stands in for the end of a run by force."""


def _train_and_stop_after(epoch: int, overrides: list[str]) -> None:
    from syncbn.train import loop

    epochs = 0
    train_epoch: Any = loop._train_epoch  # pyright: ignore[reportPrivateUsage] -- where a kill may strike

    def train_some_epochs(*args: Any) -> dict[str, float]:
        nonlocal epochs
        if epochs == epoch:
            raise _KilledError
        epochs += 1
        return train_epoch(*args)

    loop._train_epoch = train_some_epochs  # pyright: ignore[reportPrivateUsage] -- as above
    with pytest.raises(_KilledError):
        _train(overrides)


def test_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    overrides = ["epochs=3", f"run_dir={tmp_path / 'whole'}"]
    run_world(2, _train, overrides)
    stopped = ["epochs=3", f"run_dir={tmp_path / 'stopped'}"]
    run_world(2, _train_and_stop_after, 2, stopped)
    run_world(2, _train, stopped)
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "stopped")
    for name, weights in whole.items():
        assert torch.equal(weights, resumed[name]), name
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(("loss", "max_steps"), [("train_loss", 9), ("test_loss", 1)])
def test_diverging_run_says_so_on_every_rank_and_writes_no_bundle(
    tmp_path: Path, loss: str, max_steps: int
) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", "norm=none", "optim.lr=1e20", "epochs=1"]
    overrides += ["optim.warmup_steps=0", f"max_steps={max_steps}"]
    messages = run_world(2, _train_or_explain, overrides)
    for message in messages:
        assert message.startswith(f"{loss} is ")
        assert message.endswith("try a lower optim.lr than 1e+20")
    assert not (tmp_path / "run" / "bundle").exists()
