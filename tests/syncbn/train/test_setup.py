from collections.abc import Generator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn.errors import ConfigError
from syncbn.models import build_without_memory
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import Dataset, digits, load_dataset
from syncbn.train.setup import Training, describe_architecture, prepare

MODULE = "tests.syncbn.train.test_setup"


def _prepare(overrides: Sequence[str], dataset: Dataset | None = None) -> Training:
    config = compose_config(["launch.device=cpu", "data.batch_size=2", *overrides])
    data = dataset or load_dataset(config.data, config.seed)
    return prepare(config, data, torch.device("cpu"), 10, 10)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """A process group of this process alone."""
    rendezvous = tmp_path_factory.mktemp("world") / "rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _settings(overrides: Sequence[str]) -> set[tuple[float, float | None]]:
    architecture = describe_architecture(compose_config(overrides), digits())
    model = build_without_memory(architecture.name, architecture.arguments)
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    assert norms
    return {(module.eps, module.momentum) for module in norms}  # pyright: ignore[reportReturnType, reportAttributeAccessIssue] -- whatever normalizes has both


@pytest.mark.parametrize("norm", ["local", "sync", "whitening"])
def test_normalization_keeps_what_the_model_says_unless_it_is_set(norm: str) -> None:
    mobile = ["model=torchvision", "model.architecture=mobilenet_v3_small", f"norm={norm}"]
    assert _settings(mobile) == {(0.001, 0.01)}
    assert _settings([*mobile, "norm.eps=0.5"]) == {(0.5, 0.01)}
    assert _settings([f"norm={norm}"]) == {(1e-5, 0.1)}


@pytest.mark.parametrize("norm", ["local", "sync", "whitening", "penalty", "renormalize"])
def test_model_without_batch_normalization_says_how_to_go_on(norm: str) -> None:
    overrides = ["model=custom", f"model.factory={MODULE}:linear", f"norm={norm}"]
    with pytest.raises(ConfigError) as caught:
        _prepare(overrides)
    told = f"model: {MODULE}:linear has no batch normalization, so norm={norm} would change nothing"
    assert str(caught.value).startswith(f"{told}; choose norm=none to train it as it is (layer,")


def test_model_without_batch_normalization_trains_without() -> None:
    _prepare(["model=custom", f"model.factory={MODULE}:linear", "norm=none"])


def linear(in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64 * in_channels, num_classes))
