import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.bundle import (
    Architecture,
    Bundle,
    InputSpec,
    Preprocessing,
    is_bundle,
    read_bundle,
    write_bundle,
)
from syncbn.errors import BundleError
from syncbn.models import build_model
from tests.support.describe import ARGUMENTS, describe, edit_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", describe(), build_model("cnn", ARGUMENTS))
    return tmp_path / "bundle"


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    model = build_model("cnn", ARGUMENTS)
    model(torch.randn(4, 2, 8, 8))  # moves the running statistics
    manifest = write_bundle(tmp_path / "deep" / "bundle", describe(), model)
    read = read_bundle(tmp_path / "deep" / "bundle")
    assert read.manifest == manifest
    assert not read.model.training
    assert list(read.model.state_dict()) == list(model.state_dict())
    for name, value in read.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_probabilities_are_those_of_the_model_on_preprocessed_input(bundle: Path) -> None:
    read = read_bundle(bundle)
    x = torch.randn(5, 2, 8, 8)
    scaled = torch.stack([(x[:, 0] * 0.5 - 1) / 3, (x[:, 1] * 0.5 - 2) / 4], 1)
    torch.testing.assert_close(read.probabilities(x), read.model(scaled).softmax(1))


def test_bundle_holds_two_files_readable_by_others(bundle: Path) -> None:
    assert sorted(file.name for file in bundle.iterdir()) == ["bundle.json", "model.safetensors"]
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert list(bundle.parent.iterdir()) == [bundle]
    assert is_bundle(bundle)
    assert not is_bundle(bundle.parent)


def test_existing_path_is_not_overwritten(bundle: Path) -> None:
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="exists; remove it"):
        write_bundle(bundle, describe(name="other"), build_model("cnn", ARGUMENTS))
    assert (bundle / "bundle.json").read_bytes() == before


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BundleError, match="disk full"):
        write_bundle(tmp_path / "bundle", describe(), build_model("cnn", ARGUMENTS))
    assert list(tmp_path.iterdir()) == []


def _with_nan() -> torch.nn.Module:
    model = build_model("cnn", ARGUMENTS)
    model.state_dict()["0.weight"].fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (build_model("cnn", {**ARGUMENTS, "width": 8}), {}, r"'0.weight' should be .*\(4, 2, 3, 3"),
        (torch.nn.Linear(1, 1), {}, "misses tensors 0.weight"),
        (build_model("cnn", {**ARGUMENTS, "norm": "none"}), {}, "misses tensors 1.num_batch"),
        (build_model("cnn", ARGUMENTS).half(), {}, "'0.weight' should be torch.float32"),
        (_with_nan(), {}, "'0.weight' holds values that are not finite"),
        (
            build_model("cnn", ARGUMENTS),
            {"classes": ("a", "b")},
            "not into one logit for each of 2",
        ),
        (
            build_model("cnn", ARGUMENTS),
            {
                "input": InputSpec(name="image", shape=(1, 8, 8), dtype="float32"),
                "preprocessing": Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
            },
            r"refuses an input of shape \(1, 1, 8, 8\)",
        ),
    ],
)
def test_model_that_does_not_fit_is_not_written(
    tmp_path: Path, model: torch.nn.Module, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", describe(**changes), model)
    assert list(tmp_path.iterdir()) == []


def _round_trip(
    path: Path,
    name: str,
    arguments: dict[str, Any],
    model: torch.nn.Module,
    *,
    allow_imports: bool = False,
) -> Bundle:
    """Write a model for images of shape (2, 64, 64), read it back, and compare the two."""
    description = describe(
        architecture=Architecture(name=name, arguments=arguments),
        input=InputSpec(name="image", shape=(2, 64, 64), dtype="float32"),
    )
    write_bundle(path, description, model, allow_imports=allow_imports)
    read = read_bundle(path, allow_imports=allow_imports)
    assert read.manifest.architecture.arguments == arguments
    x = torch.randn(3, 2, 64, 64)
    torch.testing.assert_close(read.model(x), model.eval()(x))
    return read


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet18", {}),
        pytest.param("resnet18", {"norm": "none"}, marks=pytest.mark.long),
        ("mnasnet0_5", {"eps": 0.01}),  # tells by its version that a state dict is not an old one
        # Reads its widths off tensors while it is built.
        pytest.param("regnet_x_400mf", {}, marks=pytest.mark.long),
        # Keeps tensors that are not parameters.
        pytest.param("swin_v2_t", {}, marks=pytest.mark.long),
        pytest.param(
            "resnet50",
            {"replace_stride_with_dilation": [False, False, True]},
            marks=pytest.mark.long,
        ),
    ],
)
def test_models_of_torchvision_are_read_back(
    tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    name = f"torchvision.{name}"
    arguments = {"in_channels": 2, "num_classes": 3, **more}
    model = build_model(name, arguments)
    read = _round_trip(tmp_path / "bundle", name, arguments, model)
    assert not any(parameter.requires_grad for parameter in read.model.parameters())


def test_reading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    arguments = {"in_channels": 2, "num_classes": 3}
    name = "torchvision.shufflenet_v2_x0_5"
    description = describe(
        architecture=Architecture(name=name, arguments=arguments),
        input=InputSpec(name="image", shape=(2, 64, 64), dtype="float32"),
    )
    model = build_model(name, arguments)
    before = torch.get_rng_state()
    write_bundle(tmp_path / "bundle", description, model)
    read_bundle(tmp_path / "bundle")
    assert torch.equal(torch.get_rng_state(), before)


USERS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes, scales):
        super().__init__()
        depth = int(torch.linspace(1, 2, 3)[-1].item())
        self.layers = nn.Sequential(*[nn.BatchNorm2d(in_channels) for _ in range(depth)])
        self.register_buffer("scale", torch.tensor(scales).sum(), persistent=False)
        self.offset = torch.full((300,), 2.0)
        self.linear = nn.Linear(in_channels, num_classes)
        self.again = nn.Linear(in_channels, num_classes)
        self.again.weight = self.linear.weight

    def forward(self, x):
        x = self.layers(x).mean((2, 3)) * self.scale + self.offset[0]
        return self.linear(x) + self.again(x) * torch.ones(1)

def net_without_memory(in_channels, num_classes):
    if torch.get_default_device().type != "meta":
        raise OSError("no room")
    return nn.Sequential(nn.Flatten(), nn.Linear(128, num_classes))

class Odd(nn.Sequential):
    def __init__(self, in_channels, num_classes, kind):
        super().__init__(nn.Flatten())
        self.kind = kind

    def get_extra_state(self):
        return self.kind

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.kind != "extra":
            del state["_extra_state"]
        return state

    def forward(self, x):
        if self.kind == "fails":
            raise KeyError("nothing")
        return (x,) if self.kind == "tuple" else x.new_zeros(1, x.sum().int().item())
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's own, under a name that no other test has imported."""
    name = f"users_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_model_of_an_import_path_is_read_back_where_allowed(tmp_path: Path, users: str) -> None:
    arguments = {"in_channels": 2, "num_classes": 3, "scales": [0.5, 2.0]}
    model = build_model(f"{users}:Net", arguments, allow_imports=True)
    path = tmp_path / "bundle"
    _round_trip(path, f"{users}:Net", arguments, model, allow_imports=True)
    with pytest.raises(BundleError, match=rf"{path}: architecture '{users}:Net' is an import path"):
        read_bundle(path)
    with pytest.raises(BundleError, match="is an import path, which is refused"):
        _round_trip(tmp_path / "other", f"{users}:Net", arguments, model)
    assert not (tmp_path / "other").exists()


def test_bundle_names_no_code_that_is_imported_unasked(
    bundle: Path, users: str, tmp_path: Path
) -> None:
    edit_manifest(bundle, architecture={"name": f"{users}:Net", "arguments": {}})
    with pytest.raises(BundleError, match="is an import path, which is refused"):
        read_bundle(bundle)
    assert users not in sys.modules
    edit_manifest(bundle, architecture={"name": f"{users}:nothing", "arguments": ARGUMENTS})
    with pytest.raises(BundleError, match="cannot be imported: AttributeError"):
        read_bundle(bundle, allow_imports=True)


def test_model_that_can_only_be_checked_is_refused(tmp_path: Path, users: str) -> None:
    name = f"{users}:net_without_memory"
    arguments = {"in_channels": 2, "num_classes": 3}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 3))
    description = describe(architecture=Architecture(name=name, arguments=arguments))
    write_bundle(tmp_path / "bundle", description, model, allow_imports=True)
    with pytest.raises(BundleError, match=r"the model cannot be built for real: .* OSError: no ro"):
        read_bundle(tmp_path / "bundle", allow_imports=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fails", r"refuses an input of shape \(1, 2, 8, 8\): KeyError: 'nothing'"),
        ("tuple", "the model returns a tuple, not a tensor of logits"),
        ("reads", "refuses an input of shape .* cannot be called on meta tensors"),
        ("extra", "the model's state '_extra_state' is no tensor"),
    ],
)
def test_odd_model_is_refused(tmp_path: Path, users: str, kind: str, message: str) -> None:
    arguments = {"in_channels": 2, "num_classes": 3, "kind": kind}
    model = build_model(f"{users}:Odd", arguments, allow_imports=True)
    description = describe(architecture=Architecture(name=f"{users}:Odd", arguments=arguments))
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", description, model, allow_imports=True)


_AUDIT = """
import pathlib, sys
from syncbn.bundle import read_bundle
here, opened = pathlib.Path.cwd(), set()
def audit(event, args):
    assert event != "pickle.find_class", args
    if event == "open" and isinstance(args[0], str) and args[0].startswith(str(here)):
        opened.add(pathlib.Path(args[0]).name)
sys.addaudithook(audit)
read_bundle(here)
print(*sorted(opened))
"""


def test_reading_opens_the_two_files_and_unpickles_nothing(bundle: Path) -> None:
    (bundle / "cnn.py").write_text("raise SystemExit('executed')")
    (bundle / "model.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    result = subprocess.run(
        [sys.executable, "-c", _AUDIT],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.split() == ["bundle.json", "model.safetensors"]


def test_served_bundle_keeps_its_model_frozen(bundle: Path) -> None:
    read: Bundle = read_bundle(bundle)
    assert not any(parameter.requires_grad for parameter in read.model.parameters())
