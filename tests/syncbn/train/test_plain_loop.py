"""Our training against a loop that somebody wrote who had not read ours."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.models import cnn, unet
from syncbn.train import export, loop
from syncbn.train.config import compose_config
from syncbn.train.data import Batch, Dataset, Form, MaskedImages, Samples, StoredPairs
from syncbn.train.data.datasets import load_dataset
from syncbn.train.data.sampling import TrainingShare
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory, open_run_directory
from syncbn.train.schema import (
    AdamWConfig,
    ClassificationConfig,
    CosineConfig,
    SegmentationConfig,
    SgdConfig,
    SyncNormConfig,
    TrainConfig,
)
from tests.support.jobs import quiet_watch
from tests.support.plain_loop import Ended, Recipe, train_plainly
from tests.support.world import run_world

HERE = "tests.syncbn.train.test_plain_loop"

# Of the largest value of a tensor, or of 0.01 for what is smaller, as a bias that began at 0.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        world_size: how many ranks train.
        batch_size: of one of them.
        typed: overrides of the configuration.
        model: makes the model that they name.
    """

    world_size: int
    batch_size: int
    typed: tuple[str, ...]
    model: Callable[[], nn.Module]


def _cnn() -> nn.Module:
    return cnn(1, 10, 4)


def _unet() -> nn.Module:
    return unet(3, 11, 4, 2)


def _narrow_unet() -> nn.Module:
    return unet(1, 4, 3, 1)


class _TwoHeaded(nn.Module):
    """A U-Net with an auxiliary output in training."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = unet(in_channels, 6, 3, 1)
        self.heads = nn.ModuleList(nn.Conv2d(6, num_classes, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        first, second = (head(features) for head in self.heads)
        return (first, second) if self.training else first


def make_two_headed(in_channels: int = 1, num_classes: int = 4) -> nn.Module:
    return _TwoHeaded(in_channels, num_classes)


def make_partly_ignored() -> Dataset:
    """Return noisy images of four shades, and masks of which some count much and others nothing."""
    generator = torch.Generator().manual_seed(3)
    shape = (37, 9, 7)
    masks = torch.randint(4, shape, generator=generator, dtype=torch.uint8)
    images = masks * 50 + torch.randint(90, shape, generator=generator, dtype=torch.uint8)
    masks[::4] = 255  # not one pixel counts
    masks[1::4, 2:] = 255
    masks[2::4, :, 6] = 255
    train, validation, test = (
        MaskedImages(StoredPairs(images[part, None], masks[part]), Form(1, 9, 7), None)
        for part in (slice(0, 23), slice(23, 32), slice(32, 37))
    )
    return Dataset(
        train=train,
        validation=validation,
        test=test,
        classes=("a", "b", "c", "d"),
        input=InputSpec(name="image", shape=(1, 9, 7), dtype="float32"),
        preprocessing=Preprocessing(scale=1 / 255, mean=(0.47,), std=(0.25,)),
    )


# The running statistics follow fast, so that a model is of use after a few steps.
SGD = ("optim=sgd", "optim.lr=0.2", "schedule.warmup_steps=3", "norm.momentum=0.5")
ADAMW = ("optim=adamw", "optim.lr=0.02", "schedule.warmup_steps=2", "norm.momentum=0.5")
DIGITS = ("model=cnn", "model.width=4", "data.validation=0.12")
SCENES = (
    *("task=segmentation", "data=digit_scenes", "data.samples=26", "data.test_samples=2"),
    *("data.size=24", "data.validation=0.2", "model=unet", "model.width=4", "model.depth=2"),
)
MOVED = ("data.scale_min=0.6", "data.scale_max=1.5", "data.flip=true")
IGNORING = ("task=segmentation", "data=custom", f"data.factory={HERE}:make_partly_ignored")
NARROW = (*IGNORING, "model=unet", "model.width=3", "model.depth=1")
TWO_HEADED = (*IGNORING, "model=custom", f"model.factory={HERE}:make_two_headed")
EMA = "optim.ema_decay=0.6"
EVERYTHING = (
    *(EMA, "optim.accumulate=4", "optim.label_smoothing=0.1", "max_steps=5"),
    *("optim.decay_all=true", "optim.freeze=[3.*,4.*]", "+optim.lr_scale={0.*:0.1}"),
)
WITHOUT_WARMUP = (EMA, "optim.ema_warmup=false", "schedule.warmup_steps=0")

CASES = {
    # 1265 = 3·360 + 185 images train: the last 185 are 93 and 92, or 62, 62 and 61.
    "digits-1": Case(1, 360, (*DIGITS, *SGD), _cnn),
    "digits-2": Case(2, 180, (*DIGITS, *SGD, *WITHOUT_WARMUP), _cnn),
    "digits-3": Case(3, 120, (*DIGITS, *ADAMW), _cnn),
    # 1265 = 2·632 + 1: rank 1 has nothing of the last batch.
    "digits-2-empty": Case(2, 316, (*DIGITS, *ADAMW, EMA, "optim.clip_norm=0.5"), _cnn),
    # 1265 = 8·150 + 65: the last step of an epoch has one batch and not four.
    "digits-3-everything": Case(3, 50, (*DIGITS, *SGD, *EVERYTHING), _cnn),
    # 21 scenes train: the last 5 are 3 and 2, the last 3 one each.
    "scenes-2": Case(2, 4, (*SCENES, *ADAMW, *MOVED), _unet),
    "scenes-3": Case(3, 3, (*SCENES, *SGD, EMA), _unet),
    # 23 images train, among them 6 of which nothing counts.
    "ignored-1": Case(1, 6, (*NARROW, *SGD), _narrow_unet),
    "ignored-2": Case(2, 3, (*NARROW, *SGD, EMA, "optim.accumulate=3"), _narrow_unet),
    "ignored-3": Case(3, 2, (*NARROW, *ADAMW, "optim.label_smoothing=0.2"), _narrow_unet),
    # 23 = 2·11 + 1: rank 1 has nothing of the last batch.
    "ignored-2-empty": Case(2, 11, (*NARROW, *SGD, "optim.clip_norm=0.1"), _narrow_unet),
    "ignored-3-heads": Case(3, 2, (*TWO_HEADED, *SGD), make_two_headed),
    "ignored-3-weights": Case(3, 2, (*NARROW, *SGD, "task.class_weights=[1,2,3,4]"), _narrow_unet),
}
LONG = {
    "digits-2-weights": Case(
        2, 180, (*DIGITS, *SGD, "task.class_weights=[1,2,3,1,1,4,1,1,1,1]"), _cnn
    ),
    "scenes-1": Case(1, 6, (*SCENES, *SGD), _unet),
    "digits-3": Case(3, 16, (*DIGITS, *SGD, *EVERYTHING, "max_steps=40"), _cnn),
    "scenes-3": Case(3, 5, (*SCENES, *ADAMW, *MOVED, EMA, "data.samples=200"), _unet),
}


def _recipe(config: TrainConfig) -> Recipe:
    optim, task = config.optim, config.task
    assert isinstance(config.schedule, CosineConfig)
    assert isinstance(optim, SgdConfig | AdamWConfig)
    assert isinstance(task, ClassificationConfig | SegmentationConfig)

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if isinstance(optim, SgdConfig):
            return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=True)
        return torch.optim.AdamW(groups)

    def scale(name: str) -> float:
        return next((by for each, by in optim.lr_scale.items() if fnmatchcase(name, each)), 1.0)

    return Recipe(
        epochs=config.epochs,
        max_steps=config.max_steps,
        optimizer=optimizer,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        warmup_steps=config.schedule.warmup_steps,
        accumulate=optim.accumulate,
        clip_norm=optim.clip_norm,
        label_smoothing=optim.label_smoothing,
        class_weights=task.class_weights,
        ema_decay=optim.ema_decay,
        ema_warmup=optim.ema_warmup,
        decay_all=optim.decay_all,
        frozen=lambda name: any(fnmatchcase(name, each) for each in optim.freeze),
        lr_scale=scale,
        auxiliary=task.auxiliary if isinstance(task, SegmentationConfig) else 0.0,
    )


def _train_plainly(case: Case, overrides: list[str], weights: Path) -> Ended:
    """Train in this process, from weights that it leaves in a file."""
    config = compose_config(overrides)
    dataset = load_dataset(config.data, config.seed)
    whole = case.batch_size * case.world_size
    order = TrainingShare(len(dataset.train), whole, 0, 1, config.seed)
    scale, mean, std = (
        torch.tensor(each, dtype=torch.float64).reshape(1, -1, 1, 1)
        for each in (
            dataset.preprocessing.scale,
            dataset.preprocessing.mean,
            dataset.preprocessing.std,
        )
    )

    def batch(samples: Samples, keys: list[tuple[int, int]]) -> Batch:
        inputs, targets = samples.__getitems__(keys)
        return (inputs.double() * scale - mean) / std, targets

    def epoch(number: int) -> list[Batch]:
        order.set_position(number)
        return [batch(dataset.train, keys) for keys in order]

    held = dataset.validation
    assert held is not None
    torch.manual_seed(1)
    model = case.model().double()
    assert isinstance(config.norm, SyncNormConfig)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = config.norm.momentum
    torch.save(model.state_dict(), weights)
    validation = [batch(held, [(0, index) for index in range(len(held))])]
    return train_plainly(model, epoch, validation, len(dataset.classes), _recipe(config))


def _train(overrides: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    config = compose_config(overrides)
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    # Bundles hold float32; what is compared here are the checkpoints.
    with mock.patch.object(loop, "export", return_value=export.Exported({}, [])):
        loop.train(config, run, torch.device("cpu"), quiet_watch())


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _assert_same_state(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert ours[name].dtype == expected.dtype
        error = (ours[name] - expected).abs().max().item()
        assert error <= TOLERANCE * max(0.01, expected.abs().max().item()), name


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(
            pytest.param(case, id=f"{name}-long", marks=pytest.mark.long)
            for name, case in LONG.items()
        ),
    ],
)
def test_ranks_end_with_what_a_plain_loop_in_one_process_ends_with(
    tmp_path: Path, case: Case
) -> None:
    started = time.time()
    run_dir, weights = tmp_path / "run", tmp_path / "weights.pt"
    overrides = ["track=none", "launch.device=cpu", "log_every_steps=1", "epochs=2", *case.typed]
    overrides += [f"data.batch_size={case.batch_size}", f"model.weights={weights}"]
    overrides += [f"run_dir={run_dir}"]
    plain = _train_plainly(case, overrides, weights)
    run_world(case.world_size, _train, overrides)

    states = read_checkpoint(checkpoint_files(run_dir / "checkpoints")[0]).states
    _assert_same_state(states["model"], plain.model)
    if plain.average is not None:
        average = {key.removeprefix("module."): value for key, value in states["average"].items()}
        assert average.pop("n_averaged") == len(plain.steps)
        _assert_same_state(average, plain.average)

    lines = RunDirectory(run_dir).read_metrics()
    for line in lines:
        assert started < line.pop("time") < time.time()
        assert line.pop("images_per_s") > 0
        assert line.pop("skipped_steps") == 0
    assert lines == [pytest.approx(line, rel=TOLERANCE, abs=TOLERANCE) for line in plain.metrics]

    written = (run_dir / "steps.jsonl").read_text().splitlines()
    steps = [json.loads(line, parse_constant=_refuse) for line in written]
    logged = [(step["lr"], step["loss"]) for step in steps]
    assert logged == [pytest.approx(step, rel=TOLERANCE, abs=TOLERANCE) for step in plain.steps]
