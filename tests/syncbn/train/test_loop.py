import dataclasses
import errno
import json
import math
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError, DataError, SyncBNError, TrainingError
from syncbn.train import export
from syncbn.train.agreement import together
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import Dataset, digits
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Batch, Key
from syncbn.train.loop import train
from syncbn.train.run import directory
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import Result, RunDirectory, open_run_directory
from tests.support.jobs import quiet_watch
from tests.support.tolerance import assert_as_exact
from tests.support.world import run_world

SMALL = ["track=none", "model.width=4", "optim.lr=0.05", "launch.device=cpu", "log_every_steps=1"]


def _train(overrides: list[str], dtype: torch.dtype = torch.float32) -> Result:
    torch.set_default_dtype(dtype)
    config = compose_config([*SMALL, *overrides])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    try:
        # Drawing takes as long as training a few epochs; the curves are for others to test.
        with mock.patch.object(export, "plot_curves"):
            return train(config, run, torch.device("cpu"), quiet_watch())
    finally:
        torch.set_default_dtype(torch.float32)


def _train_or_explain(overrides: list[str]) -> str:
    try:
        _train(overrides)
    except SyncBNError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _weights(run_dir: Path) -> dict[str, Tensor]:
    return read_checkpoint(checkpoint_files(run_dir / "checkpoints")[0]).states["model"]


def _lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]


def _train_in(overrides: list[str], dtype: torch.dtype) -> Result:
    from syncbn.train import loop

    if dtype != torch.float32:
        # Bundles hold float32; what is compared here is the checkpoint.
        loop.export = lambda *args: export.Exported({}, [])  # pyright: ignore[reportAttributeAccessIssue] -- stands in for it
    return _train(overrides, dtype)


def _train_few_steps(
    tmp_path: Path, name: str, world_size: int, dtype: torch.dtype, *overrides: str
) -> dict[str, Tensor]:
    run_dir = tmp_path / name
    # Six steps within the warm-up: few enough for rounding not to have grown.
    more = [f"run_dir={run_dir}", f"name={name}", "max_steps=6", "data.validation=0"]
    run_world(world_size, _train_in, [*more, *overrides], dtype)
    return _weights(run_dir)


# Ranks and their batches: of 24 images over all ranks; of 1437, all there are, which two and three
# ranks share unevenly; and of 718, whose third and last holds one image, and nothing for rank 1.
WAYS = {
    "even": [(1, 24), (2, 12), (3, 8)],
    "uneven": [(1, 1437), (2, 719), (3, 479 + 1)],
    "empty": [(1, 718), (2, 359)],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_any_number_of_ranks_reaches_the_weights_of_one(
    tmp_path: Path, ways: list[tuple[int, int]]
) -> None:
    runs = {
        (world_size, dtype): _train_few_steps(
            tmp_path,
            f"w{world_size}-{str(dtype)[-2:]}",
            world_size,
            dtype,
            f"data.batch_size={batch_size}",
        )
        for world_size, batch_size in ways
        for dtype in (torch.float32, torch.float64)
    }
    truth = runs[1, torch.float64]
    for world_size, _ in ways[1:]:
        for name, weights in truth.items():
            exact = runs[world_size, torch.float64][name]
            torch.testing.assert_close(exact, weights, rtol=1e-12, atol=1e-12)
            if weights.is_floating_point():
                ours, plain = runs[world_size, torch.float32][name], runs[1, torch.float32][name]
                assert_as_exact(ours, weights, plain, name)


@pytest.mark.parametrize("norm", ["penalty", "renormalize", "whitening"])
def test_other_normalizations_are_those_of_all_ranks_too(tmp_path: Path, norm: str) -> None:
    # 959 samples a step, of which two ranks' shares are uneven in the last.
    one, two = (
        _train_few_steps(
            tmp_path, f"w{n}", n, torch.float64, f"norm={norm}", f"data.batch_size={size}"
        )
        for n, size in ((1, 958), (2, 479))
    )
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-9, atol=1e-10)


def test_accumulated_batches_make_the_step_of_all_together(tmp_path: Path) -> None:
    # Without batch normalization, whose statistics are those of each batch.
    whole, parts = (
        _train_few_steps(tmp_path, name, 2, torch.float64, "norm=none", *more)
        for name, more in (
            ("whole", ["data.batch_size=400"]),
            ("parts", ["data.batch_size=100", "optim.accumulate=4"]),
        )
    )
    for name, weights in whole.items():
        torch.testing.assert_close(parts[name], weights, rtol=1e-12, atol=1e-12)


def test_without_synchronizing_two_ranks_drift_from_one(tmp_path: Path) -> None:
    one, two = (
        _train_few_steps(
            tmp_path, f"w{n}", n, torch.float64, f"data.batch_size={16 // n}", "norm=local"
        )
        for n in (1, 2)
    )
    assert (one["0.weight"] - two["0.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("norm", ["sync", "local", "none"])
def test_metrics_agree_between_ranks_and_files(tmp_path: Path, norm: str) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", f"norm={norm}", "epochs=2", "optim=adamw"]
    results = run_world(2, _train, overrides)
    lines = RunDirectory(run_dir).read_metrics()
    best = max(lines, key=lambda line: line["val_accuracy"])
    bundle = read_bundle(run_dir / "bundle")
    for result in results:
        assert result.status == "finished"
        for key in ("epoch", "step", "train_loss", "val_loss", "val_accuracy", "lr"):
            assert result.metrics[key] == best[key] == bundle.manifest.metrics[key]
            assert math.isfinite(result.metrics[key])
    assert [line["step"] for line in lines] == [41, 82]
    assert [line["best"] for line in lines] == [1, float(best is lines[1])]
    assert best["val_accuracy"] > 0.5
    assert not any(key.startswith("test") for line in lines for key in line)


def test_evaluation_is_what_the_bundle_gives_on_every_sample_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (result, *_) = run_world(3, _train, [f"run_dir={run_dir}", "epochs=1"])
    test = digits().test
    assert isinstance(test, TensorImages)
    probabilities = read_bundle(run_dir / "bundle").probabilities(test.samples).double()
    right = (probabilities.argmax(1) == test.labels).double().mean()
    loss = functional.nll_loss(probabilities.log(), test.labels)
    assert result.metrics["test_accuracy"] == pytest.approx(right.item(), abs=1e-12)
    assert result.metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["sync", "local", "none"])
def test_last_batch_with_fewer_samples_than_ranks(tmp_path: Path, norm: str) -> None:
    # 1437 = 2·718 + 1: the last batch is one image, of which rank 1 has none.
    overrides = [f"run_dir={tmp_path / 'run'}", f"norm={norm}", "data.batch_size=359", "epochs=1"]
    overrides.append("data.validation=0")
    results = run_world(2, _train, overrides)
    assert results[0].metrics["step"] == 3
    for weights in _weights(tmp_path / "run").values():
        assert weights.isfinite().all()


def test_gradients_beyond_the_norm_are_scaled_down(tmp_path: Path) -> None:
    more = ("optim.lr=1", "schedule.warmup_steps=0", "optim.momentum=0", "optim.weight_decay=0")
    before, after = (
        _train_few_steps(tmp_path, name, 2, torch.float64, *more, "optim.clip_norm=0.01", steps)
        for name, steps in (("none", "max_steps=1"), ("one", "max_steps=2"))
    )
    names = [name for name in before if "num_b" not in name and "running" not in name]
    moved = [after[name] - before[name] for name in names]
    # The second of two steps along half a cosine is taken at half the rate.
    assert torch.cat([each.flatten() for each in moved]).norm() == pytest.approx(0.005, rel=1e-6)


@pytest.mark.parametrize(
    "override",
    [
        "numerics.precision=bfloat16",
        "numerics.precision=float16",
        "numerics.channels_last=true",
        "numerics.deterministic=true",
        "optim.label_smoothing=0.1",
        "optim=torch",
        "schedule=one_cycle",
        "model=mlp model.width=16",
        "norm=whitening",
        "norm=renormalize",
    ],
)
def test_option_trains_and_the_bundle_serves(tmp_path: Path, override: str) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", "epochs=1", "data.validation=0", *override.split()]
    (result, *_) = run_world(2, _train, overrides)
    assert result.metrics["test_accuracy"] > 0.3
    read_bundle(run_dir / "bundle")


def test_average_and_recalibrated_statistics_are_what_is_exported(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", "epochs=2", "optim.ema_decay=0.95", "recalibrate=true"]
    (result, *_) = run_world(2, _train, overrides)
    best = read_checkpoint(run_dir / "checkpoints" / "best.ckpt")
    bundle = read_bundle(run_dir / "bundle")
    state = bundle.model.state_dict()
    for name, value in state.items():
        equal = torch.equal(value, best.states["average"][f"module.{name}"])
        assert equal == ("running" not in name and "num_batches" not in name)
    test = digits().test
    assert isinstance(test, TensorImages)
    right = bundle.probabilities(test.samples).argmax(1) == test.labels
    assert result.metrics["test_accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["norm=none", "optim.lr=1e20", "schedule.warmup_steps=0"], "the training loss is"),
        (["norm=none", "optim.lr=1e20", "schedule.warmup_steps=0", "max_steps=1"], "val_loss is"),
    ],
)
def test_diverging_run_says_so_on_every_rank_and_writes_no_bundle(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    messages = run_world(2, _train_or_explain, [f"run_dir={tmp_path / 'run'}", *overrides])
    for text in messages:
        assert text.startswith(f"TrainingError: {message}")
        assert text.endswith("try a lower optim.lr than 1e+20, or optim.clip_norm=1")
    assert not (tmp_path / "run" / "bundle").exists()


class _Poisoned(nn.Module):
    """A model whose forward pass gives NaN once, at the tenth batch of rank 1."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.BatchNorm1d(num_classes)
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        poison = self.calls == 12 and dist.get_rank() == 1  # two calls were trials
        return self.layers(x) * (math.nan if poison else 1.0)


def make_poisoned(in_channels: int, num_classes: int) -> nn.Module:
    return _Poisoned(in_channels, num_classes)


def test_state_before_a_loss_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    factory = "model.factory=tests.syncbn.train.test_loop:make_poisoned"
    common = ["model=custom", factory, "optim.lr=0.05", "track=none"]
    common += ["schedule=constant", "schedule.warmup_steps=0"]
    run_dir = tmp_path / "run"
    texts = run_world(2, _train_custom, [*common, f"run_dir={run_dir}"])
    for text in texts:
        assert text.startswith("the training loss is nan at step 10 (epoch 1, after 288 of 1293")
        assert "ranks [1]); the state before this step is in checkpoints/step-000000009" in text
    (file,) = checkpoint_files(run_dir / "checkpoints")
    kept = read_checkpoint(file)
    assert kept.position.step == 9
    run_world(2, _train_custom, [*common, f"run_dir={tmp_path / 'nine'}", "max_steps=9"])
    for name, value in _weights(tmp_path / "nine").items():
        assert torch.equal(value, kept.states["model"][name]), name


def _train_custom(overrides: list[str]) -> str:
    config = compose_config(overrides)
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    try:
        train(config, run, torch.device("cpu"), quiet_watch())
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=mnist", "data.path=/nowhere"], "data.path=/nowhere: there is no file train-images"),
        (
            [
                *("data=custom", "data.factory=tests.syncbn.train.test_loop:make_without_labels"),
                "data.shares=by_class",
            ],
            "data.shares=by_class needs the labels of all samples in memory, which data=custom "
            "has not; choose data.shares=mixed",
        ),
        (
            ["model=torchvision", "model.architecture=alexnet", "~model.width", "norm=none"],
            "the model could not be exported once it is trained: the model refuses an input of",
        ),
    ],
)
def test_what_cannot_be_had_is_explained_on_every_rank(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    chosen = [o for o in overrides if not o.startswith("~")]
    for text in run_world(2, _explain_custom, [*chosen, f"run_dir={tmp_path / 'run'}"]):
        assert text.startswith(message)


class _WithoutLabels:
    """Samples that know their labels only when they are fetched."""

    def __len__(self) -> int:
        return len(digits().train)

    def __getitems__(self, keys: list[Key]) -> Batch:
        return digits().train.__getitems__(keys)


def make_without_labels() -> Dataset:
    return dataclasses.replace(digits(), train=_WithoutLabels())


def _explain_custom(overrides: list[str]) -> str:
    config = compose_config(["track=none", *overrides])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    with pytest.raises(ConfigError) as caught:
        train(config, run, torch.device("cpu"), quiet_watch())
    return str(caught.value)


def _fail_on_one() -> str:
    def work() -> int:
        if dist.get_rank() == 1:
            raise ConfigError("rank 1 has no such file")
        return 7

    with pytest.raises(ConfigError) as caught:
        together(work)
    return str(caught.value)


def test_error_of_one_rank_is_raised_on_all() -> None:
    assert run_world(3, _fail_on_one) == ["rank 1 has no such file"] * 3


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EISDIR, "internal"), (errno.ENOSPC, "disk_full")]
)
def test_unwritable_directory_is_one_error_on_every_rank(
    tmp_path: Path, number: int, reason: str
) -> None:
    run_dir = tmp_path / "run"
    what = [f"run_dir={run_dir}", "epochs=1"]
    for text in run_world(2, _train_without_steps_file, what, number):
        assert text == f"{reason}: cannot write to {run_dir}: {os.strerror(number)}"


def test_processes_that_fetch_have_ended_when_training_has(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(50):  # of so many, only some are looked at before training
            file = tmp_path / folder / f"{number:02}.png"
            Image.new("RGB", (8, 8), (5 * number, 0, 0)).save(file)
    broken = tmp_path / "train" / "b" / "05.png"
    broken.write_bytes(broken.read_bytes()[:40])
    before = multiprocessing.active_children()
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(DataError, match="cannot read the image") as caught:
            _train(
                [
                    "data=folder",
                    f"data.path={tmp_path}",
                    "data.size=8",
                    "data.workers=2",
                    f"run_dir={tmp_path / 'run'}",
                ]
            )
    finally:
        dist.destroy_process_group()
    assert caught.tb is not None  # holds all that would end them by being deleted
    left = [process for process in multiprocessing.active_children() if process not in before]
    for process in left:
        process.kill()  # or this process would wait for it
    assert not left


def _train_without_steps_file(overrides: list[str], number: int) -> str:
    if dist.get_rank() == 0:
        config = compose_config([*SMALL, *overrides])
        (open_run_directory(config).path / "checkpoints").touch()

    original = directory.RunDirectory.append_step

    def fail(self: RunDirectory, metrics: object) -> None:
        raise OSError(number, os.strerror(number))

    directory.RunDirectory.append_step = fail
    try:
        _train(overrides)
    except TrainingError as error:
        return f"{error.reason}: {error}"
    else:
        return ""
    finally:
        directory.RunDirectory.append_step = original
