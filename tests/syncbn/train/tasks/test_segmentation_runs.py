"""Segmentation trained: over ranks, over stops, and as its bundle gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from syncbn.bundle import read_bundle
from syncbn.train.config import compose_config
from syncbn.train.data import Dataset
from syncbn.train.data.datasets import load_dataset
from syncbn.train.interval import intervals
from syncbn.train.run.directory import RunDirectory
from syncbn.train.tasks import make_task
from tests.support.jobs import outcome
from tests.support.runs import few_steps, train_small
from tests.support.samples import dataset_of
from tests.support.world import run_world

MODULE = "tests.syncbn.train.tasks.test_segmentation_runs"
UNET = ["task=segmentation", "model=unet", "model.depth=2"]
SCENES = [
    *(*UNET, "data=digit_scenes", "data.size=16", "data.samples=24", "data.test_samples=5"),
    *("data.batch_size=4", "epochs=2", "task.dice=0.5", "data.validation=0.2"),
]
STEPS = 6  # 19 images, 8 a step, in two epochs


def make_uneven(count: int = 13) -> Dataset:
    """Return images of which some masks, and so some ranks, have few valid pixels or none."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.randint(3, (count, 8, 8), generator=generator)
    ignored = (
        torch.rand(count, 8, 8, generator=generator) < torch.linspace(0, 1, count)[:, None, None]
    )
    return dataset_of(masks.where(~ignored, 255), 3, shape=(2, 8, 8), validation=masks[:3])


def test_any_number_of_ranks_reaches_the_weights_of_one(tmp_path: Path) -> None:
    # 12 of 13 images in each epoch's first step; the rest is one, and other ranks have none of it.
    overrides = [
        *UNET,
        "data=custom",
        f"data.factory={MODULE}:make_uneven",
        "optim.label_smoothing=0.1",
    ]
    overrides += ["task.class_weights=[1,3,0.5]", "task.dice=0.7"]
    one, *others = (
        few_steps(tmp_path / f"w{size}", size, *overrides, f"data.batch_size={12 // size}")
        for size in (1, 2, 3)
    )
    for other in others:
        for name, weights in one.items():
            torch.testing.assert_close(other[name], weights, rtol=1e-11, atol=1e-12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a run that nobody stopped, and what it came to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    result, _ = run_world(2, train_small, [*SCENES, f"run_dir={run_dir}"])
    return run_dir, result


def test_stops_within_an_epoch_and_at_the_last_step_end_bit_identical(
    whole: Any, tmp_path: Path
) -> None:
    overrides = [*SCENES, f"run_dir={tmp_path / 'run'}"]
    for step in (1, STEPS - 1):
        stopped = run_world(2, train_small, overrides, torch.float32, None, step)
        assert [each.status for each in stopped] == ["interrupted"] * 2
        assert stopped[0].error == f"stopped by SIGTERM after step {step + 1}"
    results = run_world(2, train_small, overrides)
    assert [each.status for each in results] == ["finished"] * 2
    assert outcome(RunDirectory(tmp_path / "run")) == outcome(RunDirectory(whole[0]))
    assert results[0].evaluations == whole[1].evaluations


def _outputs(run_dir: Path) -> tuple[Any, Tensor, Tensor]:
    """Return the task, and the logits of a run's bundle and the masks of all test images."""
    config = compose_config([*SCENES, "model.width=4", f"run_dir={run_dir}"])
    dataset = load_dataset(config.data, config.seed)
    assert dataset.test is not None
    images, masks = dataset.test.__getitems__([(0, i) for i in range(len(dataset.test))])
    probabilities = read_bundle(run_dir / "bundle").probabilities(images)
    return make_task(config, dataset), probabilities.log(), masks


def test_evaluation_is_what_the_bundle_gives_on_every_test_image_once(whole: Any) -> None:
    run_dir, result = whole
    task, logits, masks = _outputs(run_dir)
    assert len(masks) == 5
    right = (logits.argmax(1) == masks).double().mean().item()
    assert result.metrics["test_pixel_accuracy"] == pytest.approx(right, abs=1e-12)
    loss = functional.cross_entropy(logits, masks).item()
    assert result.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    observed = task.observe(logits, masks)
    mean_iou = task.metrics(observed.sum(0).tolist())["mean_iou"]
    assert result.metrics["test_mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    losses = task.losses(logits, masks, False).double()
    rows = torch.cat([losses[:, None], task.weights(masks)[:, None], observed], dim=1)
    (evaluation,) = result.evaluations
    assert (evaluation["split"], evaluation["samples"]) == ("test", 5)
    assert evaluation["statistics"] == "as trained"
    for name, (low, high) in intervals(task, rows).items():
        estimate = evaluation["metrics"][name]
        assert (estimate["low"], estimate["high"]) == pytest.approx((low, high), rel=1e-4)
        assert low <= estimate["value"] <= high


def test_bundle_says_what_it_answers_and_how_good_it_is(whole: Any) -> None:
    run_dir, result = whole
    manifest = read_bundle(run_dir / "bundle").manifest
    assert manifest.task == "segmentation"
    assert len(manifest.classes) == 11
    assert manifest.palette is not None
    assert [each.model_dump() for each in manifest.evaluations] == result.evaluations
    lines = RunDirectory(run_dir).read_metrics()
    assert [line["step"] for line in lines] == [STEPS // 2, STEPS]
    assert {"val_mean_iou", "val_pixel_accuracy", "val_loss"} <= lines[0].keys()
    best = max(lines, key=lambda line: (line["val_mean_iou"], -line["val_loss"]))
    assert result.metrics["epoch"] == best["epoch"]
    assert result.objective == 1 - best["val_mean_iou"]


def make_ignored() -> Dataset:
    """Return images of whose validation masks all pixels are ignored."""
    nothing = torch.full((3, 8, 8), 255)
    masks = torch.randint(3, (8, 8, 8), generator=torch.Generator().manual_seed(0))
    return dataset_of(masks, 3, shape=(2, 8, 8), validation=nothing, test=nothing)


def test_masks_without_valid_pixels_select_some_epoch_and_measure_nothing(tmp_path: Path) -> None:
    overrides = [*UNET, "data=custom", f"data.factory={MODULE}:make_ignored", "epochs=2"]
    (result,) = run_world(1, train_small, [*overrides, f"run_dir={tmp_path / 'run'}"])
    assert result.status == "finished"
    assert result.metrics["epoch"] == 1
    metrics = read_bundle(tmp_path / "run" / "bundle").manifest.metrics
    assert "val_mean_iou" not in metrics
    assert metrics["val_loss"] == 0


@pytest.mark.long
def test_auxiliary_head_of_torchvision_learns_and_is_not_exported(tmp_path: Path) -> None:
    overrides = ["task=segmentation", *SCENES[3:], "model=torchvision", "max_steps=1"]
    overrides += ["model.architecture=deeplabv3_mobilenet_v3_large", "data.size=32"]
    overrides += ["+model.arguments.aux_loss=true", f"run_dir={tmp_path / 'run'}"]
    (result,) = run_world(1, train_small, overrides)
    assert result.status == "finished"
    manifest = read_bundle(tmp_path / "run" / "bundle").manifest
    assert (manifest.task, manifest.metrics["step"]) == ("segmentation", 1)


class _WithAuxiliary(nn.Module):
    """A model that has a second output while it is in training mode."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, num_classes, 1)
        self.auxiliary = nn.Conv2d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        if self.training:
            return self.head(features), self.auxiliary(features)
        return self.head(features)


def make_with_auxiliary(in_channels: int, num_classes: int) -> nn.Module:
    return _WithAuxiliary(in_channels, num_classes)


@pytest.mark.parametrize("norm", ["local", "none", "sync"])
def test_auxiliary_head_learns_though_a_rank_has_no_image_of_the_last_batch(
    tmp_path: Path, norm: str
) -> None:
    # 13 images, 12 a step: rank 1 has none of the last one, twice.
    overrides = ["task=segmentation", "data=custom", f"data.factory={MODULE}:make_uneven"]
    overrides += ["model=custom", f"model.factory={MODULE}:make_with_auxiliary"]
    overrides += [f"norm={norm}", "data.batch_size=6", "epochs=2", f"run_dir={tmp_path / 'run'}"]
    results = run_world(2, train_small, overrides, deadline_s=30)
    assert [each.status for each in results] == ["finished"] * 2
    assert results[0].metrics["step"] in (2, 4)
