"""The models that are served, as bundles, and the samples that are sent to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from syncbn.bundle import (
    Architecture,
    Description,
    InputSpec,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from syncbn.models import build_model

SAMPLES = 32
TOLERANCE = 1e-4  # of a probability


@dataclass(frozen=True)
class Workload:
    """A model and its input."""

    title: str
    architecture: str
    arguments: Mapping[str, int | float | bool | str]
    shape: tuple[int, int, int]


WORKLOADS = {
    "tiny": Workload(
        "cnn of width 16, 1×8×8",
        "cnn",
        {"in_channels": 1, "num_classes": 10, "width": 16},
        (1, 8, 8),
    ),
    "resnet18": Workload(
        "ResNet-18, 3×64×64",
        "torchvision.resnet18",
        {"in_channels": 3, "num_classes": 10},
        (3, 64, 64),
    ),
}


def write_model(name: str, directory: Path) -> Path:
    """Write the bundle of a random model whose running statistics have moved."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = build_model(workload.architecture, workload.arguments)
    with torch.no_grad():
        model(torch.randn(64, *workload.shape))
    channels = workload.shape[0]
    description = Description(
        name=name,
        architecture=Architecture(name=workload.architecture, arguments=workload.arguments),
        input=InputSpec(name="image", shape=workload.shape, dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.5,) * channels, std=(2.0,) * channels),
        classes=tuple(map(str, range(10))),
        metrics={},
        config_sha256="0" * 64,
    )
    write_bundle(directory / name, description, model)
    return directory / name


def write_samples(bundle: Path, file: Path) -> None:
    """Write samples, and the probabilities that a server must answer with."""
    read = read_bundle(bundle)
    torch.manual_seed(1)
    samples = torch.randn(SAMPLES, *read.manifest.input.shape)
    np.savez(file, samples=samples.numpy(), expected=read.probabilities(samples).numpy())
