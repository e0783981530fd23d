"""Classification: losses, weights and metrics, alone and over ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import load_dataset
from syncbn.train.tasks import Classification, make_task
from tests.support.runs import explained, few_steps, train_small
from tests.support.samples import dataset_of
from tests.support.world import WorldError, run_world

MODULE = "tests.syncbn.train.tasks.test_classification"
LABELS = torch.tensor([0, 3, 1, 1, 6, 2, 5, 0, 4])
WEIGHTS = [1.0, 2.5, 0.25, 3.0, 1.5, 0.5, 4.0]


def _logits(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LABELS), 7, generator=generator, dtype=torch.float64).to(dtype) * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_mean_of_the_losses_is_torchs_cross_entropy(
    weights: list[float] | None, smoothing: float
) -> None:
    task = Classification(dataset_of(LABELS, 7), weights, label_smoothing=smoothing)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    for training, smooth in ((True, smoothing), (False, 0.0)):
        ours, theirs = _logits().requires_grad_(), _logits().requires_grad_()
        losses = task.losses(ours, LABELS, training)
        assert losses.shape == LABELS.shape
        mean = losses.sum() / task.weights(LABELS).sum()
        truth = functional.cross_entropy(theirs, LABELS, tensor, label_smoothing=smooth)
        mean.backward()
        truth.backward()
        torch.testing.assert_close(mean, truth, rtol=1e-14, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    task = Classification(dataset_of(LABELS, 7), WEIGHTS)
    logits = _logits(dtype)
    losses = task.losses(logits, LABELS, True)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, task.losses(logits.float(), LABELS, True))


def test_top5_counts_labels_among_the_five_most_probable() -> None:
    task = Classification(dataset_of(LABELS, 7))
    logits = _logits()
    sums = task.observe(logits, LABELS).sum(0).tolist()
    ranks = [
        sorted(row, reverse=True).index(row[label])
        for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    assert task.metrics(sums) == {
        "accuracy": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5_accuracy": sum(rank < 5 for rank in ranks) / len(ranks),
    }
    assert task.proportions == {"accuracy": (1, 0), "top5_accuracy": (2, 0)}


def test_five_classes_have_no_top5() -> None:
    task = Classification(dataset_of(LABELS % 5, 5))
    assert task.statistics == 2
    assert task.observe(_logits()[:, :5], LABELS % 5).shape == (len(LABELS), 2)
    metrics = task.metrics([0.0, 0.0])
    assert list(metrics) == ["accuracy"]
    assert math.isnan(metrics["accuracy"])


def test_no_samples_have_no_losses_and_weigh_nothing() -> None:
    task = Classification(dataset_of(LABELS, 7), WEIGHTS)
    empty = LABELS[:0]
    assert task.losses(_logits()[:0], empty, True).sum() == 0
    assert task.weights(empty).sum() == 0
    assert task.observe(_logits()[:0], empty).sum(0).tolist() == [0, 0, 0]


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


def mean_of_them(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels)


def no_tensor(logits: Tensor, labels: Tensor) -> float:
    return 1.0


def broken(logits: Tensor, labels: Tensor) -> Tensor:
    return logits @ labels


def test_own_loss_is_imported_and_weighted() -> None:
    config = compose_config(
        [f"task.loss={MODULE}:focal", "task.class_weights=[1,2,3,1,1,1,1,1,1,1]"]
    )
    dataset = load_dataset(config.data, 0)
    task = make_task(config, dataset)
    labels = LABELS[:4]
    logits = torch.randn(4, 10, dtype=torch.float64)
    ours = task.losses(logits, labels, True)
    weights = torch.tensor([1, 1, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(ours, focal(logits, labels) * weights)
    assert torch.equal(task.weights(labels), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["task.class_weights=[1,2]"], "task.class_weights=[1.0, 2.0] are 2 numbers; give 10 "),
        ([f"task.loss={MODULE}:nothing"], "cannot be imported: AttributeError"),
        ([f"task.loss={MODULE}:WEIGHTS"], "is a list; it must be a function"),
        (["data=digit_scenes"], "task=classification learns from labels, and the targets of the "),
        (
            ["task=segmentation"],
            "task=segmentation learns from masks, and the targets of the data ",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_said_before_training(
    change: list[str], message: str
) -> None:
    few = ["data.samples=4", "data.test_samples=2"] if "data=digit_scenes" in change else []
    config = compose_config([*change, *few])
    with pytest.raises(ConfigError) as caught:
        make_task(config, load_dataset(config.data, 0))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            [f"task.loss={MODULE}:mean_of_them"],
            "task.loss returned () for targets of shape (16,); it must return a loss for each "
            "target, without a mean over them",
        ),
        ([f"task.loss={MODULE}:no_tensor"], "task.loss returned float for targets of shape (16,)"),
        (
            [f"task.loss={MODULE}:broken"],
            "task.loss failed for outputs of shape (16, 10) and targets of shape (16,): "
            "RuntimeError: ",
        ),
        (
            ["model=unet", "model.width=4", "model.depth=2"],
            "the model could not be exported once it is trained: the model turns one sample into "
            "shape (1, 10, 8, 8), not into one logit for each of 10 classes",
        ),
    ],
)
def test_loss_and_model_that_do_not_fit_end_the_run_before_its_first_step(
    world_of_one: None, tmp_path: Path, change: list[str], message: str
) -> None:
    text = explained([f"run_dir={tmp_path / 'run'}", *change])
    assert text.startswith(f"ConfigError: {message}"), text
    assert not (tmp_path / "run" / "steps.jsonl").exists()


def test_class_weights_are_those_of_one_process_for_uneven_ranks(tmp_path: Path) -> None:
    # All of 1437 images, which two and three ranks share unevenly, with other classes each.
    weights = "task.class_weights=[1,2,0.5,4,1,1,3,0.25,1,8]"
    one, *others = (
        few_steps(tmp_path / f"w{size}", size, weights, f"data.batch_size={batch}", "max_steps=4")
        for size, batch in ((1, 1437), (2, 719), (3, 480))
    )
    plain = few_steps(tmp_path / "plain", 1, "data.batch_size=1437", "max_steps=4")
    assert not torch.allclose(plain["0.weight"], one["0.weight"])
    for other in others:
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-12, atol=1e-12)


def test_own_loss_trains_and_is_measured(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", "epochs=1", f"task.loss={MODULE}:focal"]
    result: Any = run_world(2, train_small, overrides)[0]
    test: Any = load_dataset(compose_config([]).data, 0).test
    bundle = read_bundle(run_dir / "bundle")
    log_p = bundle.probabilities(test.samples).log()
    loss = focal(log_p, test.labels).mean().item()
    assert result.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["test_accuracy"] > 0.5


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that no samples do not have."""
    return functional.cross_entropy(logits / logits.abs().max(), labels, reduction="none")


def test_loss_that_fails_without_samples_is_refused_if_a_rank_will_have_none(
    tmp_path: Path,
) -> None:
    # 1437 = 2·718 + 1: rank 1 has none of the last batch.
    overrides = [f"task.loss={MODULE}:scaled", "data.validation=0", f"run_dir={tmp_path / 'run'}"]
    texts = run_world(2, explained, [*overrides, "data.batch_size=359"])
    for text in texts:
        assert text.startswith("ConfigError: task: Classification fails for no samples")
        assert "set data.drop_last=true" in text
    overrides[-1] = f"run_dir={tmp_path / 'dropped'}"
    more = ["data.batch_size=359", "data.drop_last=true", "max_steps=2"]
    assert run_world(2, explained, [*overrides, *more]) == ["", ""]


def picky(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that refuses what it has seen on rank 1 alone, in training."""
    if torch.is_grad_enabled() and dist.get_rank() == 1:
        raise ValueError("not this one")
    return functional.cross_entropy(logits, labels, reduction="none")


def test_loss_that_fails_on_one_rank_is_said_by_that_rank(tmp_path: Path) -> None:
    # Of a ConfigError, which all ranks raise, rank 0 alone would speak.
    overrides = [f"task.loss={MODULE}:picky", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(WorldError, match=r"DataError: task.loss failed .*ValueError: not this one"):
        run_world(2, train_small, overrides, deadline_s=30)


def pickier(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that refuses everything on rank 1 alone."""
    if dist.get_rank() == 1:
        raise ValueError("nothing at all")
    return functional.cross_entropy(logits, labels, reduction="none")


def test_trial_that_fails_on_one_rank_is_said_by_all(tmp_path: Path) -> None:
    overrides = [f"task.loss={MODULE}:pickier", f"run_dir={tmp_path / 'run'}"]
    for text in run_world(2, explained, overrides, deadline_s=20):
        assert text.startswith("ConfigError: task.loss failed for outputs of shape (16, 10)")
