from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError
from syncbn.models import build_without_memory
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import Dataset, digits, load_dataset
from syncbn.train.setup import Training, describe_architecture, prepare
from syncbn.train.tasks import Classification
from syncbn.train.trial import try_out
from tests.support.jobs import Job

MODULE = "tests.syncbn.train.test_setup"


def _prepare(overrides: Sequence[str], dataset: Dataset | None = None) -> Training:
    config = compose_config(["launch.device=cpu", "data.batch_size=2", *overrides])
    data = dataset or load_dataset(config.data, config.seed)
    training = prepare(config, Classification(data), data, torch.device("cpu"), 10, 10)
    try_out(training, data, [2], 0)
    return training


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """A process group of this process alone."""
    rendezvous = tmp_path_factory.mktemp("world") / "rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _settings(overrides: Sequence[str]) -> set[tuple[float, float | None]]:
    architecture = describe_architecture(compose_config(overrides), Classification(digits()))
    model = build_without_memory(architecture.name, architecture.arguments)
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    assert norms
    return {(module.eps, module.momentum) for module in norms}  # pyright: ignore[reportReturnType, reportAttributeAccessIssue] -- whatever normalizes has both


@pytest.mark.parametrize(
    ("overrides", "name", "arguments"),
    [
        (["model=cnn", "model.width=4"], "cnn", {"width": 4}),
        (["model=unet", "model.weights=x.pt"], "unet", {"width": 32, "depth": 4}),
        (
            ["model=unet", "model.encoder=timm.resnet18", "model.width=8"],
            "unet.timm.resnet18",
            {"width": 8, "depth": 4},
        ),
        (
            ["model=timm", "+model.arguments.drop_rate=0.5", "model.weights=x.pt"],
            "timm.resnet18",
            {"drop_rate": 0.5},
        ),
        (
            [
                *("model=torchvision", "model.architecture=fcn_resnet50"),
                "+model.arguments.aux_loss=true",
            ],
            "torchvision.fcn_resnet50",
            {"aux_loss": True},
        ),
    ],
)
def test_architecture_is_the_configured_one_without_the_file_it_starts_from(
    overrides: list[str], name: str, arguments: dict[str, Any]
) -> None:
    architecture = describe_architecture(compose_config(overrides), Classification(digits()))
    assert architecture.name == name
    always = {"in_channels": 1, "num_classes": 10, "norm": "batch"}
    assert architecture.arguments == arguments | always
    build_without_memory(architecture.name, architecture.arguments)


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


class _Partly(nn.Sequential):
    """A model of which a part, and a parameter, are made and never used."""

    def __init__(self, in_channels: int, num_classes: int, frozen: bool = False) -> None:
        flat = 64 * in_channels
        super().__init__(nn.Flatten(), nn.Linear(flat, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, num_classes)
        self.unused = nn.Linear(3, 2).requires_grad_(not frozen)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self[2](self[1](self[0](input))))


PARTLY = ("model=custom", f"model.factory={MODULE}:_Partly")


def test_unused_parameters_are_named_with_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        _prepare(PARTLY)
    assert str(caught.value).startswith("model: unused.weight, unused.bias had no part in the loss")
    assert str(caught.value).endswith(
        "leave them out of the model, freeze them with optim.freeze, or choose "
        "launch.find_unused_parameters=true, which looks for them in each step"
    )


@pytest.mark.parametrize(
    "override", ["launch.find_unused_parameters=true", "optim.freeze=[unused.*]"]
)
def test_unused_parameters_stay_as_they_are_where_they_are_expected(
    tmp_path: Path, override: str
) -> None:
    job = Job(tmp_path / "run", *PARTLY, "epochs=1", "optim.accumulate=2", override)
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    state = read_bundle(job.run.bundle_dir, allow_imports=True).model.state_dict()
    torch.manual_seed(0)
    assert torch.equal(state["unused.weight"], _Partly(1, 10).unused.weight)


def test_whole_numbers_stay_whole_in_a_factorys_arguments() -> None:
    given = ["+model.arguments.dim=-1", "+model.arguments.p=0.5", "+model.arguments.sizes=[-2,3]"]
    config = compose_config([*PARTLY, *given])
    arguments = describe_architecture(config, Classification(digits())).arguments
    assert [repr(arguments[key]) for key in ("dim", "p", "sizes")] == ["-1", "0.5", "[-2, 3]"]
