"""Segmentation: losses, weights and metrics of masks, with pixels that count nowhere."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from syncbn.errors import ConfigError
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import load_dataset
from syncbn.train.tasks import Segmentation, make_task
from tests.support.runs import explained
from tests.support.samples import dataset_of

MODULE = "tests.syncbn.train.tasks.test_segmentation"
K, H, W = 4, 5, 6
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def _masks() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(3, (4, H, W), generator=generator)  # no pixel has the class 3
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    masks[2] = 255
    masks[3] = 1
    return masks


def _logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, K, H, W, generator=generator, dtype=torch.float64)


def _task(**options: Any) -> Segmentation:
    return Segmentation(dataset_of(_masks(), K, shape=(3, H, W)), **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_mean_of_the_losses_is_torchs_cross_entropy_of_the_valid_pixels(
    weights: list[float] | None, smoothing: float
) -> None:
    task, masks = _task(class_weights=weights, label_smoothing=smoothing), _masks()
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    for training, smooth in ((True, smoothing), (False, 0.0)):
        ours, theirs = _logits().requires_grad_(), _logits().requires_grad_()
        losses = task.losses(ours, masks, training)
        assert losses.shape == (4,)
        mean = losses.sum() / task.weights(masks).sum()
        truth = functional.cross_entropy(
            theirs, masks, tensor, ignore_index=255, label_smoothing=smooth
        )
        mean.backward()
        truth.backward()
        torch.testing.assert_close(mean, truth, rtol=1e-13, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-16)


def _dice_by_a_loop(logits: Tensor, mask: Tensor) -> float:
    p = logits.softmax(0)
    ratios: list[float] = []
    for number in range(K):
        both = either = 0.0
        for row in range(H):
            for column in range(W):
                actual = int(mask[row, column])
                if actual != 255:
                    q = float(actual == number)
                    likely = p[number, row, column].item()
                    both += likely * q
                    either += likely + q
        ratios.append(2 * both / either if either else 1.0)
    return 1 - sum(ratios) / K


def test_dice_is_that_of_a_loop_over_pixels() -> None:
    logits, masks = _logits(), _masks()
    plain, dice = _task(), _task(dice=0.7)
    found = dice.losses(logits, masks, True) - plain.losses(logits, masks, True)
    pixels = plain.weights(masks)
    wanted = [
        0.7 * _dice_by_a_loop(each, mask) * count.item()
        for each, mask, count in zip(logits, masks, pixels, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert torch.equal(dice.losses(logits, masks, False), plain.losses(logits, masks, False))


def test_dice_has_the_gradient_of_finite_differences() -> None:
    task, masks = _task(dice=1.0, class_weights=WEIGHTS, label_smoothing=0.1), _masks()
    inputs = _logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: task.losses(x, masks, True).sum(), (inputs,))


def test_auxiliary_outputs_count_in_training_alone() -> None:
    task, masks = _task(auxiliary=0.3), _masks()
    logits, first, second = _logits(), _logits(1), _logits(2)
    alone = [task.losses(each, masks, True) for each in (logits, first, second)]
    together = task.losses((logits, first, second), masks, True)
    torch.testing.assert_close(together, alone[0] + 0.3 * alone[1] + 0.3 * alone[2])
    assert task.answer((logits, first)) is logits
    assert task.answer(logits) is logits
    evaluated = task.losses((logits, first), masks, False)
    assert torch.equal(evaluated, task.losses(logits, masks, False))


def test_every_output_must_have_a_logit_for_each_class_and_pixel() -> None:
    task, good = _task(), _logits()
    task.check_output((good, good), 4)
    for wrong in (good[:, :3], (good, good[..., :-1]), {"out": good}, good[0]):
        with pytest.raises(ConfigError, match=r"the task needs logits of shape \(4, 4, 5, 6\)"):
            task.check_output(wrong, 4)


def _confusion(logits: Tensor, masks: Tensor) -> list[list[int]]:
    table = [[0] * K for _ in range(K)]
    for found, actual in zip(
        logits.argmax(1).flatten().tolist(), masks.flatten().tolist(), strict=True
    ):
        if actual != 255:
            table[actual][found] += 1
    return table


@pytest.mark.parametrize("forbidden", [(), (3,), (0, 3)], ids=["all", "absent", "never found"])
def test_metrics_are_those_of_a_confusion_matrix(forbidden: tuple[int, ...]) -> None:
    task, masks, logits = _task(), _masks(), _logits()
    logits[:, list(forbidden)] = -99
    observed = task.observe(logits, masks)
    assert (observed.shape, observed.dtype) == ((4, task.statistics), torch.float64)
    table = _confusion(logits, masks)
    ratios: list[float] = []
    for number in range(K):
        there = sum(table[number])
        found = sum(row[number] for row in table)
        if there + found:
            ratios.append(table[number][number] / (there + found - table[number][number]))
    assert len(ratios) == (3 if 3 in forbidden else 4)  # a class that nobody saw has none
    metrics = task.metrics(observed.sum(0).tolist())
    assert metrics["mean_iou"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-14)
    right = sum(table[number][number] for number in range(K))
    assert metrics["pixel_accuracy"] == right / int((masks != 255).sum())


def test_class_that_is_ignored_is_none_of_those_of_the_mean_iou() -> None:
    # Pixels of class 0 count nowhere, so the class cannot be found rightly, only wrongly.
    task, masks = _task(ignore_index=0), _masks()
    right = functional.one_hot(masks.where(masks != 255, 0), K).movedim(3, 1).double()
    right[0, 0, masks[0] == 1] = 9  # some pixels are taken for what is ignored
    metrics = task.metrics(task.observe(right, masks).sum(0).tolist())
    ones, twos = int((masks == 1).sum()), int((masks == 2).sum())
    missed = int((masks[0] == 1).sum())
    assert metrics["mean_iou"] == pytest.approx(((ones - missed) / ones + 1) / 2)
    assert metrics["pixel_accuracy"] == (ones + twos - missed) / (ones + twos)


def test_observations_of_images_add_up_however_they_are_shared() -> None:
    task, masks, logits = _task(), _masks(), _logits()
    whole = task.observe(logits, masks)
    parts = [task.observe(logits[i : i + 1], masks[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("options", [{}, {"dice": 1.0, "class_weights": WEIGHTS}])
def test_masks_of_which_all_pixels_are_ignored_weigh_nothing(options: dict[str, Any]) -> None:
    task = _task(label_smoothing=0.1, **options)
    masks = torch.full((4, H, W), 255)
    logits = _logits().requires_grad_()
    losses = task.losses((logits, logits), masks, True)
    losses.sum().backward()
    assert losses.tolist() == [0] * 4
    assert logits.grad is not None
    assert not logits.grad.any()
    assert task.weights(masks).tolist() == [0] * 4
    sums = task.observe(logits.detach(), masks).sum(0).tolist()
    assert not any(sums)
    assert all(math.isnan(value) for value in task.metrics(sums).values())


def test_ignored_pixels_have_no_gradient() -> None:
    masks, logits = _masks(), _logits().requires_grad_()
    _task(dice=1.0, label_smoothing=0.1).losses(logits, masks, True).sum().backward()
    assert logits.grad is not None
    ignored = (masks == 255)[:, None].expand_as(logits)
    assert not logits.grad[ignored].any()
    assert bool(logits.grad[~ignored].any())


def test_no_images_have_no_losses() -> None:
    task, empty = _task(dice=1.0, class_weights=WEIGHTS), _masks()[:0]
    assert task.losses(_logits()[:0], empty, True).sum() == 0
    assert task.weights(empty).sum() == 0
    assert task.observe(_logits()[:0], empty).shape == (0, 3 * K)


def test_what_lies_outside_of_an_image_is_ignored_besides_the_chosen_index() -> None:
    # Scaling and cropping fill up with 255, whatever is to be ignored.
    masks, logits = _masks(), _logits()
    zero = _task(ignore_index=0, dice=1.0, class_weights=WEIGHTS)
    default = _task(dice=1.0, class_weights=WEIGHTS)
    without = masks.where(masks != 0, 255)
    assert torch.equal(zero.losses(logits, masks, True), default.losses(logits, without, True))
    assert torch.equal(zero.weights(masks), default.weights(without))
    assert torch.equal(zero.observe(logits, masks), default.observe(logits, without))


def squared(logits: Tensor, masks: Tensor) -> Tensor:
    return functional.cross_entropy(logits, masks, reduction="none").square()


def one_for_an_image(logits: Tensor, masks: Tensor) -> Tensor:
    return squared(logits, masks).mean((1, 2))


SCENES = [
    *("task=segmentation", "data=digit_scenes", "data.samples=8", "data.test_samples=4"),
    *("model=unet", "model.depth=2", "data.size=16", "data.batch_size=4"),
]


def test_own_loss_leaves_out_what_is_ignored() -> None:
    loss = f"task.loss={MODULE}:squared"
    config = compose_config([*SCENES, loss])
    task = make_task(config, load_dataset(config.data, 0))
    masks = _masks()
    logits = torch.randn(4, 11, H, W, dtype=torch.float64)
    pixels = squared(logits, masks.where(masks != 255, 0))
    wanted = pixels.where(masks != 255, 0).flatten(1).sum(1)
    torch.testing.assert_close(task.losses(logits, masks, True), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["task.class_weights=[1,2,3]"],
            "task.class_weights=[1.0, 2.0, 3.0] are 3 numbers; give 11 positive ones, one for each "
            "class in the order of the classes, or null",
        ),
        (
            [f"task.loss={MODULE}:one_for_an_image"],
            "task.loss returned (4,) for targets of shape (4, 16, 16); it must return a loss for "
            "each target, without a mean over them",
        ),
        (
            ["task=classification"],
            "task=classification learns from labels, and the targets of the data are masks; choose "
            "task=segmentation, or other data",
        ),
        (
            ["model=cnn", "~model.depth"],
            "the model could not be exported once it is trained: the model turns one sample into "
            "shape (1, 11)",
        ),
    ],
)
def test_what_does_not_fit_masks_ends_the_run_before_its_first_step(
    world_of_one: None, tmp_path: Path, change: list[str], message: str
) -> None:
    without = [each.removeprefix("~") for each in change if each.startswith("~")]
    kept = [each for each in SCENES if not each.startswith(tuple(without or ["-"]))]
    more = [each for each in change if not each.startswith("~")]
    text = explained([f"run_dir={tmp_path / 'run'}", *kept, *more])
    assert text.startswith(f"ConfigError: {message}"), text
