"""One small model, and a client of a service that has it loaded."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from syncbn.bundle import (
    Architecture,
    Description,
    InputSpec,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from syncbn.models import build_model

CLASSES = ("circle", "square", "star")


def write_small_bundle(
    path: Path, name: str = "shapes", seed: int = 0, norm: str = "batch"
) -> None:
    """Write a bundle of a random model for images of shape (1, 4, 4)."""
    torch.manual_seed(seed)
    arguments: dict[str, int | float | bool | str] = {
        "in_channels": 1,
        "num_classes": len(CLASSES),
        "width": 4,
        "norm": norm,
    }
    model = build_model("cnn", arguments)
    model(torch.randn(64, 1, 4, 4))  # moves the running statistics
    description = Description(
        name=name,
        architecture=Architecture(name="cnn", arguments=arguments),
        input=InputSpec(name="image", shape=(1, 4, 4), dtype="float32"),
        preprocessing=Preprocessing(scale=0.5, mean=(0.25,), std=(2.0,)),
        classes=CLASSES,
        metrics={"test_accuracy": 0.875},
        config_sha256="0" * 64,
    )
    write_bundle(path, description, model)
    assert read_bundle(path).manifest.name == name


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_small_bundle(directory / "one")
    return directory


@pytest.fixture(scope="module")
def client(models: Path) -> Generator[TestClient]:
    app = create_app(
        Settings(models=models, max_body_bytes=100_000, max_batch_size=64, max_request_rows=100)
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
