"""Bundles of small models that answer masks and tensors, for tests of the service."""

from pathlib import Path
from typing import Any

import torch

from syncbn.bundle import (
    Architecture,
    Description,
    Estimate,
    Evaluation,
    InputSpec,
    Preprocessing,
    write_bundle,
)
from syncbn.models import build_model
from tests.support.networks import SEGMENTER, VECTORS

GROUNDS = ("ground", "circle", "square")
PALETTE = ((10, 20, 30), (230, 159, 0), (86, 180, 233))
EVALUATION = Evaluation(
    split="test",
    samples=360,
    statistics="as trained",
    metrics={
        "mean_iou": Estimate(value=0.812, low=0.79, high=0.834),
        "loss": Estimate(value=0.25, low=None, high=None),
    },
)


def write_segmenter(path: Path, factory: str = SEGMENTER, **changes: Any) -> None:
    """Write the bundle of a random segmentation for images of shape (1, 6, 8)."""
    _write(path, factory, {"name": "segments", "task": "segmentation"} | changes)


def write_vectors(path: Path, **changes: Any) -> None:
    """Write the bundle of a random model from images of shape (1, 6, 8) to vectors of 3."""
    _write(path, VECTORS, {"name": "vectors", "task": "tensor"} | changes)


def _write(path: Path, factory: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shape = changes.get("shape", (1, 6, 8))
    arguments = {"in_channels": shape[0], "num_classes": len(changes.get("classes", GROUNDS))}
    model = build_model(factory, arguments, allow_imports=True)
    x = torch.randn(64, *shape)
    model(x)  # moves the running statistics
    if factory == SEGMENTER:
        # No class is likelier than the others on the whole, so that masks have several.
        with torch.no_grad():
            last = model.get_submodule("3")
            last.get_parameter("bias").sub_(model.eval()(0.5 * x).mean((0, 2, 3)))
    values: dict[str, Any] = {
        "architecture": Architecture(name=factory, arguments=arguments),
        "input": InputSpec(name="image", shape=shape, dtype="float32"),
        "preprocessing": Preprocessing(scale=1.0, mean=(0.5,) * shape[0], std=(0.25,) * shape[0]),
        "classes": GROUNDS,
        "metrics": {"test_mean_iou": 0.812},
        "config_sha256": "0" * 64,
    }
    changes = {key: value for key, value in changes.items() if key != "shape"}
    write_bundle(path, Description(**values | changes), model, allow_imports=True)
