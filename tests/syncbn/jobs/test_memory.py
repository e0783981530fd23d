import dataclasses
from typing import Any

import pytest

from syncbn.jobs.offer.memory import (
    LARGE_MILLIONS,
    MOST_MILLIONS,
    Shape,
    job_bytes,
    parameters,
    sample_shape,
)
from syncbn.models import build_without_memory
from syncbn.train.catalog import torchvision_names
from syncbn.train.config import compose_config
from syncbn.train.schema import ModelConfig


def _built(model: ModelConfig, shape: Shape) -> int:
    arguments: dict[str, Any] = {
        key: value
        for key, value in dataclasses.asdict(model).items()
        if key in ("width", "depth", "size")
    }
    arguments |= {"in_channels": shape.channels, "num_classes": shape.classes}
    built = build_without_memory(model.name, arguments)
    return sum(each.numel() for each in built.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=cnn", "model.width=17"],
        ["model=cnn", "data=synthetic", "data.channels=5", "data.classes=7"],
        ["model=mlp", "model.width=19", "model.depth=1"],
        ["model=mlp", "model.size=5", "model.depth=6", "data=synthetic", "data.channels=2"],
        ["model=unet", "model.width=6", "model.depth=3", "task=segmentation", "data=digit_scenes"],
        ["model=unet", "model.width=3", "model.depth=1", "data=digit_scenes"],
    ],
)
def test_parameters_of_our_models_are_counted_exactly(overrides: list[str]) -> None:
    config = compose_config(overrides)
    shape = sample_shape(config.data)
    assert parameters(config, shape) == _built(config.model, shape)


def _millions(name: str) -> float:
    built = build_without_memory(f"torchvision.{name}", {"in_channels": 3, "num_classes": 1000})
    return sum(each.numel() for each in built.parameters()) / 1e6


@pytest.mark.parametrize("name", ["vit_h_14", "wide_resnet101_2", "resnet18", "convnext_base"])
def test_parameters_of_torchvision_are_known(name: str) -> None:
    known = LARGE_MILLIONS.get(name)
    millions = _millions(name)
    assert millions <= (known or MOST_MILLIONS)
    assert known is None or known - 1 < millions


@pytest.mark.long
def test_parameters_of_all_of_torchvision_are_known() -> None:
    large = {name: _millions(name) for name in torchvision_names()}
    assert {name for name, size in large.items() if size > MOST_MILLIONS} == set(LARGE_MILLIONS)
    assert all(known - 1 < large[name] <= known for name, known in LARGE_MILLIONS.items())


def test_memory_grows_with_replicas_batches_samples_and_loaders() -> None:
    plain = job_bytes(compose_config(["data=synthetic"]))
    for override in (
        "launch.nproc=3",
        "data.batch_size=64",
        "data.samples=10000",
        "data.workers=1",
        "data.size=64",
        "data.classes=10000",
        "model.width=64",
    ):
        assert job_bytes(compose_config(["data=synthetic", override])) > plain
