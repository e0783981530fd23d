"""What is measured of a model, whatever its buffers, and what the data and the state must hold."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bundle import InputSpec, Preprocessing, read_bundle
from syncbn.train.config import compose_config
from syncbn.train.data import Dataset
from syncbn.train.data.datasets import load_dataset
from syncbn.train.feed import Feed
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory
from tests.support.jobs import outcome, quiet_watch
from tests.support.runs import explained, train_small
from tests.support.samples import Pairs, dataset_of
from tests.support.world import run_world

MODULE = "tests.syncbn.train.test_evaluation"


class _Drifting(nn.Module):
    """A classifier that adds a buffer to its logits, which each rank moves its own way."""

    bias: Tensor

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.BatchNorm1d(num_classes)
        )
        self.register_buffer("bias", torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            rank = dist.get_rank()
            self.bias[rank] += 0.05 + rank
        return self.layers(x) + self.bias.detach()


def make_drifting(in_channels: int, num_classes: int) -> nn.Module:
    return _Drifting(in_channels, num_classes)


def test_metrics_are_those_of_the_buffers_that_are_exported_and_no_mixture(tmp_path: Path) -> None:
    # On rank 1 alone, the bias would make everything class 1.
    overrides = ["model=custom", f"model.factory={MODULE}:make_drifting", "epochs=2"]
    overrides += ["data.batch_size=100", f"run_dir={tmp_path / 'run'}"]
    results = run_world(3, train_small, overrides)
    first, *others = (
        {name: value for name, value in result.metrics.items() if name != "images_per_s"}
        for result in results
    )
    assert others == [first, first]
    bundle = read_bundle(tmp_path / "run" / "bundle", allow_imports=True)
    bias: Any = bundle.model.get_buffer("bias")
    assert bias[0] > 0
    assert not bias[1:].any()
    dataset = load_dataset(compose_config([]).data, 0)
    found: list[float] = []
    for samples in (dataset.validation, dataset.test):
        assert samples is not None
        images, labels = samples.__getitems__([(0, index) for index in range(len(samples))])
        right = bundle.probabilities(images).argmax(1) == labels
        found.append(right.double().mean().item())
    metrics = results[0].metrics
    assert [metrics["val_accuracy"], metrics["test_accuracy"]] == pytest.approx(found, abs=1e-12)


def make_far() -> Dataset:
    """Return images whose means are 3000 times their deviations, and labels to be learned."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = 3000 + torch.randn(96, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    samples = Pairs(images, labels)
    return Dataset(
        train=samples,
        test=None,
        classes=("a", "b", "c"),
        input=InputSpec(name="image", shape=(1, 8, 8), dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
    )


def make_first(in_channels: int, num_classes: int) -> nn.Module:
    """Return a model whose normalization comes first, so that it sees what the images are."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.Flatten(), nn.Linear(64 * in_channels, num_classes)
    )


def test_resume_is_bit_identical_if_means_are_3000_deviations(tmp_path: Path) -> None:
    overrides = ["model=custom", f"model.factory={MODULE}:make_first", "data=custom"]
    overrides += [f"data.factory={MODULE}:make_far", "data.batch_size=8", "epochs=2"]
    overrides += ["data.validation=0"]
    whole, parts = (tmp_path / "whole", tmp_path / "parts")
    run_world(2, train_small, [*overrides, f"run_dir={whole}"])
    run_world(2, train_small, [*overrides, f"run_dir={parts}"], torch.float32, None, 2)
    kept = read_checkpoint(checkpoint_files(parts / "checkpoints")[0])
    ((_, shift),) = kept.states["shifts"].items()
    assert (shift - 3000).abs().max() < 5
    run_world(2, train_small, [*overrides, f"run_dir={parts}"])
    assert outcome(RunDirectory(parts)) == outcome(RunDirectory(whole))


def test_remainder_of_one_sample_is_refused_at_the_start_with_the_ways_out(tmp_path: Path) -> None:
    # 1437 = 2·718 + 1
    overrides = ["model=mlp", "data.batch_size=359", "data.validation=0", "epochs=1"]
    overrides.append(f"run_dir={tmp_path / 'run'}")
    for text in run_world(2, explained, overrides):
        assert text.startswith(
            "ConfigError: the last batch of each epoch has 1 of 1437 samples over all 2 ranks, and "
            "the model cannot learn from so few: "
        )
        assert text.endswith("; set data.drop_last=true, or another data.batch_size than 359")
    assert not checkpoint_files(tmp_path / "run" / "checkpoints")
    more = [*overrides[:-1], f"run_dir={tmp_path / 'dropped'}", "data.drop_last=true"]
    result, _ = run_world(2, train_small, more)
    assert (result.status, result.metrics["step"]) == ("finished", 2)


def make_of_own() -> Dataset:
    """Return data drawn from a generator that nobody seeds."""
    generator = torch.Generator()
    generator.seed()
    return dataset_of(torch.randint(3, (64,), generator=generator), 3)


def make_from_global() -> Dataset:
    """Return data drawn from torch's generator, which the trainer seeds."""
    return dataset_of(torch.randint(3, (64,)), 3)


def make_from_file() -> Dataset:
    """Return data that depend on a file in the working directory."""
    return dataset_of((torch.arange(64) + int(Path("start").read_text())) % 3, 3)


def _custom(factory: str, run_dir: Path) -> list[str]:
    return ["data=custom", f"data.factory={MODULE}:{factory}", "epochs=1", f"run_dir={run_dir}"]


def test_data_that_differ_between_ranks_are_refused_and_the_ranks_named(tmp_path: Path) -> None:
    for text in run_world(3, explained, _custom("make_of_own", tmp_path / "own")):
        assert text == (
            "ConfigError: the data of the ranks [1, 2] are others than those of rank 0: their "
            "files differ, or data.factory draws from generators of its own; let all ranks read "
            "the same files, and draw from generators that are seeded by a constant"
        )
    assert run_world(3, explained, _custom("make_from_global", tmp_path / "global")) == [""] * 3


def test_data_that_changed_since_the_checkpoint_are_refused(tmp_path: Path) -> None:
    start = tmp_path / "start"
    run_dir = tmp_path / "run"
    overrides = [*_custom("make_from_file", run_dir), "epochs=2"]
    start.write_text("0")
    (stopped,) = run_world(1, _within, tmp_path, overrides, 3)
    assert "stopped by SIGTERM" in stopped
    start.write_text("1")
    (text,) = run_world(1, _within, tmp_path, overrides, None)
    assert text == (
        "TrainingError: the data are others than those that this run began with: files, labels or "
        "samples have changed; put them back, or start a new run with another run_dir"
    )
    start.write_text("0")
    assert run_world(1, _within, tmp_path, overrides, None) == ["finished"]


def _within(directory: Path, overrides: list[str], stop_at: int | None) -> str:
    os.chdir(directory)
    if stop_at is None:
        return explained(overrides) or "finished"
    return str(train_small(overrides, stop_at=stop_at).error)


def _held_out_sizes(overrides: list[str]) -> list[int]:
    config = compose_config(overrides)
    feed = Feed(config, dist.get_rank(), dist.get_world_size(), False, quiet_watch())
    assert feed.validation is not None
    return [len(samples) for samples, _ in feed.validation]


def test_evaluation_takes_no_more_memory_than_training() -> None:
    # Images of which a few fill a GPU come in batches of a few, and small ones by the 64.
    ((*small, _),) = run_world(1, _held_out_sizes, ["data.batch_size=3"])
    ((*large, _),) = run_world(1, _held_out_sizes, ["data.batch_size=100"])
    assert (set(small), set(large)) == ({3}, {64})
