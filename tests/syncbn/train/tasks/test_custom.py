"""A task of the user's own: a regression, from training to the bundle."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn.bundle import read_bundle
from syncbn.errors import BundleError, ConfigError
from syncbn.train.config import compose_config
from syncbn.train.data import Dataset
from syncbn.train.run.directory import RunDirectory
from syncbn.train.selection import objective, quality
from syncbn.train.tasks import make_task
from tests.support.jobs import outcome
from tests.support.runs import explained, few_steps, train_small
from tests.support.samples import dataset_of
from tests.support.world import run_world

MODULE = "tests.syncbn.train.tasks.test_custom"


class Regression:
    """Two numbers for each image, learned by their squared error."""

    answers: Any = "tensor"
    best = "squared_error"
    maximize = False
    statistics = 2
    weighs_samples_alike = True

    def __init__(self, scale: float = 1.0) -> None:
        self.proportions: Mapping[str, tuple[int, int]] = {}
        self._scale = scale

    def model_arguments(self) -> dict[str, Any]:
        return {"in_channels": 1, "num_classes": 2}

    def check_output(self, output: object, samples: int) -> None:
        assert isinstance(output, Tensor)

    def answer(self, output: Any) -> Tensor:
        return output

    def weights(self, targets: Tensor) -> Tensor:
        return torch.ones(len(targets), dtype=torch.float64)

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        return self._scale * (output - targets).square().mean(1)

    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        errors = (answer.double() - targets).square().mean(1)
        return torch.stack([torch.ones_like(errors), errors], dim=1)

    def metrics(self, sums: Any) -> dict[str, float]:
        return {"squared_error": sums[1] / sums[0] if sums[0] else math.nan}


def make_regression(dataset: Dataset, scale: float = 1.0) -> Regression:
    return Regression(scale)


def make_numbers() -> Dataset:
    def numbers(count: int, seed: int) -> Tensor:
        return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))

    return dataset_of(numbers(21, 0), 0, test=numbers(5, 1), validation=numbers(4, 2))


REGRESSION = [
    *("task=custom", f"task.factory={MODULE}:make_regression", "data=custom"),
    *(f"data.factory={MODULE}:make_numbers", "data.batch_size=4", "epochs=3"),
]


def test_custom_task_trains_goes_on_bit_identical_and_is_exported(tmp_path: Path) -> None:
    whole, parts = ([*REGRESSION, f"run_dir={tmp_path / name}"] for name in ("whole", "parts"))
    result, _ = run_world(2, train_small, whole)
    (stopped, _) = run_world(2, train_small, parts, torch.float32, None, 3)
    assert stopped.status == "interrupted"
    run_world(2, train_small, parts)
    runs = [RunDirectory(tmp_path / name) for name in ("whole", "parts")]
    assert outcome(runs[0]) == outcome(runs[1])

    lines = runs[0].read_metrics()
    best = min(lines, key=lambda line: line["val_squared_error"])
    assert result.metrics["epoch"] == best["epoch"]
    assert result.objective == best["val_squared_error"]

    # Read without leave to import: a bundle names the model, and not the task.
    bundle = read_bundle(tmp_path / "whole" / "bundle")
    assert bundle.manifest.task == "tensor"
    assert bundle.manifest.classes == ()
    for file in (tmp_path / "whole" / "bundle").iterdir():
        assert MODULE.encode() not in file.read_bytes()
    test: Any = make_numbers().test
    answer = bundle.model(test.samples)
    error = (answer - test.targets).square().mean().item()
    assert result.metrics["test_squared_error"] == pytest.approx(error, rel=1e-5)
    (evaluation,) = result.evaluations
    estimate = evaluation["metrics"]["squared_error"]
    assert estimate["low"] < estimate["value"] < estimate["high"]
    with pytest.raises(BundleError, match="tensor"):
        bundle.probabilities(test.samples)


def test_ranks_reach_the_weights_of_one_for_a_custom_task(tmp_path: Path) -> None:
    one, three = (
        few_steps(tmp_path / f"w{size}", size, *REGRESSION, f"data.batch_size={batch}")
        for size, batch in ((1, 12), (3, 4))
    )
    for name, weights in one.items():
        torch.testing.assert_close(three[name], weights, rtol=1e-12, atol=1e-12)


def make_model(in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.BatchNorm1d(num_classes)
    )


def test_model_by_import_path_is_refused_by_who_may_not_import(tmp_path: Path) -> None:
    overrides = [*REGRESSION, "model=custom", f"model.factory={MODULE}:make_model", "epochs=1"]
    overrides.append("data.batch_size=7")
    run_world(1, train_small, [*overrides, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(BundleError, match="import"):
        read_bundle(tmp_path / "run" / "bundle")
    assert read_bundle(tmp_path / "run" / "bundle", allow_imports=True).manifest.task == "tensor"


def test_arguments_reach_the_factory() -> None:
    config = compose_config([*REGRESSION, "+task.arguments.scale=3"])
    task = make_task(config, make_numbers())
    losses = task.losses(torch.ones(1, 2), torch.zeros(1, 2), True)
    assert losses.tolist() == [3]


def test_less_is_better_if_the_task_says_so() -> None:
    task = Regression()
    epochs = [
        {"val_squared_error": error, "val_loss": loss}
        for error, loss in ((2.0, 0.0), (1.0, 3.0), (1.0, 2.0), (math.nan, 0.0))
    ]
    assert max(epochs, key=lambda epoch: quality(epoch, task)) is epochs[2]
    assert quality({}, task) < quality(epochs[3], task)
    assert objective(epochs[0], task) == 2


def make_nothing(dataset: Dataset) -> object:
    return object()


def make_failure(dataset: Dataset) -> object:
    raise KeyError("a file")


def make_wrong(dataset: Dataset, **members: Any) -> Regression:
    task = Regression()
    for name, value in members.items():
        setattr(task, name, value)
    return task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([f"task.factory={MODULE}:none"], "cannot be imported: AttributeError"),
        ([f"task.factory={MODULE}:make_nothing"], "returned a object without answers, best"),
        ([f"task.factory={MODULE}:make_failure"], "failed with task.arguments={}: KeyError"),
        (["+task.arguments.x=1"], "failed with task.arguments={'x': 1}: TypeError"),
        (
            [f"task.factory={MODULE}:make_wrong", "+task.arguments.answers=regression"],
            "whose answers is 'regression'; it must be one of classification, segmentation, tensor",
        ),
        (
            [f"task.factory={MODULE}:make_wrong", "+task.arguments.statistics=-1"],
            "whose statistics is -1; it must be a whole number from 0 on",
        ),
    ],
)
def test_factory_that_makes_no_task_is_explained(change: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(compose_config([*REGRESSION, *change]), make_numbers())
    assert message in str(caught.value)


class MeanLoss(Regression):
    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        return super().losses(output, targets, training).mean()


class Unknown(Regression):
    best = "accuracy"


class Failing(Regression):
    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        return {}["x"]


class Long(Regression):
    statistics = 3


class Tensors(Regression):
    def metrics(self, sums: Any) -> Any:
        return {"squared_error": torch.tensor(1.0)}


class Misplaced(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.proportions = {"squared_error": (0, 7)}


class Negative(Regression):
    def weights(self, targets: Tensor) -> Tensor:
        return -super().weights(targets)


def make_one_of(dataset: Dataset, name: str) -> Any:
    return globals()[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "MeanLoss",
            "losses returned a tensor of shape () for 4 samples; it must return a tensor ",
        ),
        ("Unknown", "best is 'accuracy', which is none of the metrics squared_error; epochs are "),
        ("Failing", "observe failed for targets of shape (4, 2): KeyError: 'x'"),
        (
            "Long",
            "observe returned a tensor of shape (4, 2) for 4 samples; it must return a tensor ",
        ),
        ("Tensors", "metrics returned {'squared_error': tensor(1.)}; it must return a dict of "),
        ("Misplaced", "proportions has 'squared_error': (0, 7); it must be a metric, with the "),
        ("Negative", "weights returned [-1.0, -1.0, -1.0, -1.0]…; no weight may be below 0"),
    ],
)
def test_task_that_does_not_keep_the_protocol_is_named_before_the_first_step(
    world_of_one: None, tmp_path: Path, name: str, message: str
) -> None:
    factory = [f"task.factory={MODULE}:make_one_of", f"+task.arguments.name={name}"]
    text = explained([*REGRESSION, *factory, f"run_dir={tmp_path / 'run'}"])
    assert text.startswith(f"ConfigError: task: {name}.{message}"), text


def make_masked_numbers() -> Dataset:
    numbers = make_numbers()
    return dataclasses.replace(numbers, classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))


def test_colors_of_classes_are_left_out_of_what_is_no_segmentation(tmp_path: Path) -> None:
    overrides = [*REGRESSION, f"data.factory={MODULE}:make_masked_numbers", "epochs=1"]
    (result,) = run_world(1, train_small, [*overrides, f"run_dir={tmp_path / 'run'}"])
    assert result.status == "finished"
    assert read_bundle(tmp_path / "run" / "bundle").manifest.palette is None


class Partial(Regression):
    """A task that learns one of two outputs alone."""

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        return super().losses(self.answer(output), targets, training)

    def answer(self, output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    def check_output(self, output: object, samples: int) -> None:
        assert isinstance(output, tuple)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Any:
        return (self.first(x), self.second(x)) if self.training else self.first(x)


def make_two(in_channels: int, num_classes: int) -> nn.Module:
    return _Two()


def make_partial(dataset: Dataset) -> Any:
    return Partial()


def test_output_that_the_task_does_not_learn_is_named_by_its_parameters(tmp_path: Path) -> None:
    overrides = [*REGRESSION, f"task.factory={MODULE}:make_partial", "model=custom", "norm=none"]
    overrides += [f"model.factory={MODULE}:make_two", f"run_dir={tmp_path / 'run'}"]
    for text in run_world(2, explained, overrides):
        assert text.startswith("ConfigError: model: second.1.weight, second.1.bias had no part in")
    for number, cure in enumerate(
        ("optim.freeze=[second.*]", "launch.find_unused_parameters=true")
    ):
        cured = [*overrides[:-1], cure, f"run_dir={tmp_path / f'cured-{number}'}"]
        assert run_world(2, explained, cured) == ["", ""]


class Counting(Regression):
    """A task one of whose metrics would be taken for the number of the step."""

    def metrics(self, sums: Any) -> dict[str, float]:
        return {**super().metrics(sums), "step": 3.0}


def make_counting(dataset: Dataset) -> Any:
    return Counting()


def test_metric_with_the_name_of_something_else_is_refused(tmp_path: Path) -> None:
    overrides = [*REGRESSION, f"task.factory={MODULE}:make_counting", f"run_dir={tmp_path / 'run'}"]
    (text,) = run_world(1, explained, overrides)
    assert text.startswith("ConfigError: task: Counting.metrics calls a metric 'step', which is")
