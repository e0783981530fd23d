"""Training on a GPU: one rank by NCCL, and two ranks that share it by gloo.

The same on the CPU is in the other files; here is what a GPU alone can show.
"""

import os
import signal
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn.bundle import read_bundle
from syncbn.train import export
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import digits
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Batch
from syncbn.train.loop import train
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory, open_run_directory
from syncbn.train.step import Stepper
from tests.support.gpu import needs_gpu
from tests.support.jobs import Job, comparable, outcome, quiet_watch, wait_until
from tests.support.world import run_world

pytestmark = needs_gpu

DEVICE = "cuda"
# By NCCL, which takes a GPU for each rank; and by gloo, by which ranks can share one.
WORLDS = {
    "one rank": [f"launch.device={DEVICE}", "launch.nproc=1"],
    "two ranks": [f"launch.device={DEVICE}", "launch.nproc=2", "launch.ranks_per_gpu=2"],
}
_ONE, _TWO = WORLDS.values()
# The first kernels of a process, and what compiles, take long.
_DEADLINE_S = 300


def _finish(run_dir: Path, *overrides: str) -> RunDirectory:
    """Train until the end."""
    job = Job(run_dir, "log_every_steps=1", *overrides)
    assert job.wait(_DEADLINE_S) == 0, Path(f"{run_dir}.out").read_text()
    return job.run


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="sync"),
        pytest.param(["norm=local"], id="local"),
        pytest.param(["norm=whitening"], id="whitening"),
        pytest.param(["norm=penalty"], id="penalty"),
        pytest.param(["norm=renormalize"], id="renormalize"),
        pytest.param(["numerics.precision=bfloat16"], id="bfloat16"),
        pytest.param(["numerics.precision=float16", "optim.clip_norm=5"], id="float16"),
        pytest.param(["numerics.precision=float16", "optim=torch"], id="float16 rmsprop"),
        pytest.param(
            ["numerics.channels_last=true", "numerics.precision=bfloat16"], id="channels_last"
        ),
        pytest.param(["numerics.compile=true"], id="compile"),
        pytest.param(
            ["numerics.compile=true", "numerics.precision=bfloat16", "numerics.channels_last=true"],
            id="compile bfloat16",
        ),
        pytest.param(["numerics.deterministic=true"], id="deterministic"),
        pytest.param(["optim=adamw", "optim.ema_decay=0.9", "optim.accumulate=2"], id="average"),
        pytest.param(["recalibrate=true", "data.workers=2"], id="recalibrate"),
    ],
)
def test_one_rank_trains_and_its_bundle_serves_on_the_cpu(
    tmp_path: Path, overrides: list[str]
) -> None:
    run = _finish(tmp_path / "run", "epochs=2", "model.width=8", *_ONE, *overrides)
    assert f"1 ranks on {DEVICE}" in run.log_file.read_text()
    result = run.read_result()
    assert result is not None
    accuracy = result.metrics["test_accuracy"]
    assert accuracy > 0.3
    test = digits().test
    assert isinstance(test, TensorImages)
    right = read_bundle(run.bundle_dir).probabilities(test.samples).argmax(1) == test.labels
    # Of 360 images, a few lie so near to two classes that rounding decides.
    assert right.double().mean().item() == pytest.approx(accuracy, abs=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="sync"),
        pytest.param(["norm=local"], id="local"),
        pytest.param(["numerics.precision=bfloat16"], id="bfloat16"),
        pytest.param(["numerics.precision=float16"], id="float16"),
        pytest.param(["numerics.channels_last=true"], id="channels_last"),
        pytest.param(["numerics.compile=true"], id="compile"),
    ],
)
def test_two_ranks_train_on_one_gpu(tmp_path: Path, overrides: list[str]) -> None:
    run = _finish(tmp_path / "run", "epochs=2", *_TWO, *overrides)
    assert f"2 ranks on {DEVICE}" in run.log_file.read_text()
    result = run.read_result()
    assert result is not None
    assert result.metrics["test_accuracy"] > 0.3


def test_two_ranks_reach_the_weights_of_one(tmp_path: Path) -> None:
    # A perceptron, since convolutions take TF32.
    common = [
        "model=mlp",
        "model.width=16",
        "max_steps=6",
        "checkpoint.every_steps=6",
        "name=run",
        "optim.lr=0.01",
    ]
    weights = [
        read_checkpoint(checkpoint_files(run.checkpoints_dir)[0]).states["model"]
        for run in (
            _finish(tmp_path / "one", *common, *_ONE, "data.batch_size=24"),
            _finish(tmp_path / "two", *common, *_TWO, "data.batch_size=12"),
        )
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


class _Dropping(nn.Module):
    """A model that draws from the generator of its device."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * 36, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def make_dropping(in_channels: int, num_classes: int) -> nn.Module:
    return _Dropping(in_channels, num_classes)


_EXACT = (
    *("model=custom", f"model.factory={__name__}:make_dropping", "numerics.deterministic=true"),
    *("epochs=3", "checkpoint.every_steps=4", "log_every_steps=1", "optim.accumulate=2"),
)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="float32"),
        pytest.param(["numerics.precision=float16", "optim.clip_norm=5"], id="float16"),
        pytest.param(["numerics.precision=bfloat16", "numerics.channels_last=true"], id="bfloat16"),
        pytest.param(["optim=adamw", "optim.ema_decay=0.9"], id="average"),
    ],
)
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_run_told_to_stop_goes_on_bit_identical_if_deterministic(
    tmp_path: Path, world: list[str], overrides: list[str]
) -> None:
    how = [*_EXACT, *world, *overrides]
    job = Job(tmp_path / "stopped", *how)
    wait_until(lambda: len(_lines(job.run)) >= 10 or not job.supervisor.is_alive(), _DEADLINE_S)
    os.kill(job.ranks()[-1], signal.SIGTERM)
    assert job.wait(_DEADLINE_S) == 128 + signal.SIGTERM, Path(f"{job.run.path}.out").read_text()
    result = job.run.read_result()
    assert result is not None
    assert result.error == f"stopped by SIGTERM after step {len(_lines(job.run))}"
    resumed = outcome(_finish(tmp_path / "stopped", *how))
    assert resumed == outcome(_finish(tmp_path / "whole", *how))
    newest = read_checkpoint(checkpoint_files(job.run.checkpoints_dir)[0])
    assert all(("cuda" in states) == (DEVICE == "cuda") for states in newest.generators)


def _lines(run: RunDirectory) -> list[str]:
    return run.steps_file.read_text().splitlines() if run.steps_file.exists() else []


@pytest.mark.parametrize(
    "overrides", [[], ["optim=adamw", "optim.ema_decay=0.9"], ["optim=torch"]], ids=str
)
def test_loss_that_is_not_finite_reaches_nothing(tmp_path: Path, overrides: list[str]) -> None:
    factory = "model.factory=tests.syncbn.train.test_loop:make_poisoned"
    common = ["model=custom", factory, "schedule=constant", "schedule.warmup_steps=0", *_TWO]
    common += ["numerics.deterministic=true", "optim.lr=0.001", *overrides]
    job = Job(tmp_path / "poisoned", *common)
    assert job.wait(_DEADLINE_S) == 1
    result = job.run.read_result()
    assert result is not None
    assert str(result.error).startswith("the training loss is nan at step 10 (epoch 1, after 288")
    assert "ranks [1]); the state before this step is in" in str(result.error)
    (file,) = checkpoint_files(job.run.checkpoints_dir)
    kept = read_checkpoint(file)
    whole = _finish(tmp_path / "nine", *common, "max_steps=9", "checkpoint.every_steps=9")
    nine = read_checkpoint(checkpoint_files(whole.checkpoints_dir)[0])
    assert kept.position.step == nine.position.step == 9
    for name, states in nine.states.items():
        assert comparable(kept.states[name]) == comparable(states), name


def test_run_on_the_cpu_goes_on_on_a_gpu_and_says_so(tmp_path: Path) -> None:
    common = ("epochs=3", "log_every_steps=1", "launch.nproc=1")
    job = Job(tmp_path / "run", *common)
    wait_until(lambda: len(_lines(job.run)) >= 10)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    job.wait()
    run = _finish(tmp_path / "run", *common, *_ONE)
    assert f"the run goes on on {DEVICE}, and was on cpu" in run.log_file.read_text()


def _train_without_waits(overrides: list[str]) -> int:
    """Train on a GPU by NCCL, where a wait of the host in a step raises; return the steps."""
    torch.use_deterministic_algorithms(False)  # what these tests have set themselves
    dist.destroy_process_group()
    device = torch.device(DEVICE, 0)
    torch.cuda.set_device(device)
    made: list[int] = []
    original = Stepper.make

    def make(self: Stepper, micro: list[Batch], *args: Any) -> Any:
        assert self.is_late
        made.append(1)
        # DDP arranges its buckets, and libraries load their kernels, in the first ones.
        torch.cuda.set_sync_debug_mode("error" if len(made) > 3 else "default")
        try:
            return original(self, micro, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"file://{directory}/rendezvous",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
            device_id=device,
        )
        config = compose_config(["track=none", "max_steps=20", "log_every_steps=1", *overrides])
        with (
            mock.patch.object(export, "plot_curves"),
            mock.patch.object(Stepper, "make", make),
        ):
            train(config, open_run_directory(config), device, quiet_watch())
    return len(made)


@pytest.mark.parametrize(
    "overrides",
    [
        ["norm=none"],
        ["norm=sync"],
        ["norm=sync", "optim.ema_decay=0.9", "optim.clip_norm=1", "optim.accumulate=2"],
        ["norm=sync", "numerics.precision=float16", "optim=adamw"],
        ["norm=sync", "numerics.precision=bfloat16", "numerics.channels_last=true"],
    ],
    ids=str,
)
def test_host_waits_for_no_step(tmp_path: Path, overrides: list[str]) -> None:
    more = [*overrides, f"run_dir={tmp_path / 'run'}"]
    assert run_world(1, _train_without_waits, more, deadline_s=_DEADLINE_S) == [20]


def test_outcome_of_a_run_is_repeated_if_deterministic(tmp_path: Path) -> None:
    how = [*_EXACT, *_ONE]
    first, second = (outcome(_finish(tmp_path / name, *how, "name=run")) for name in "ab")
    assert first == second
