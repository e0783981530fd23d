import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from syncbn.bundle import (
    MANIFEST_LIMIT_BYTES,
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
from tests.support.describe import ARGUMENTS, describe


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
    _edit(architecture={"name": f"{users}:Net", "arguments": {}})(bundle)
    with pytest.raises(BundleError, match="is an import path, which is refused"):
        read_bundle(bundle)
    assert users not in sys.modules
    _edit(architecture={"name": f"{users}:nothing", "arguments": ARGUMENTS})(bundle)
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


Damage = Callable[[Path], object]


def _edit(**changes: Any) -> Damage:
    """Return a function that sets keys of a bundle's manifest; None removes one."""

    def edit(bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text()) | changes
        kept = {key: value for key, value in manifest.items() if value is not None}
        (bundle / "bundle.json").write_text(json.dumps(kept))

    return edit


def _replace_weights(state: dict[str, torch.Tensor] | bytes) -> Damage:
    """Return a function that puts other weights into a bundle, with a manifest that fits them."""

    def replace(bundle: Path) -> None:
        import hashlib

        content = state if isinstance(state, bytes) else safetensors.torch.save(state)
        (bundle / "model.safetensors").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        weights = {"file": "model.safetensors", "sha256": digest, "size_bytes": len(content)}
        _edit(weights=weights)(bundle)

    return replace


def _flip_a_bit(bundle: Path) -> None:
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


def _replace_weights_by_fifo(bundle: Path) -> None:
    (bundle / "model.safetensors").unlink()
    os.mkfifo(bundle / "model.safetensors")


def _state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return build_model("cnn", ARGUMENTS).state_dict() | changes


VIT = {"in_channels": 2, "num_classes": 3}
BIG = 2**31 - 1
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no bundle": (shutil.rmtree, "cannot read .*bundle.json: No such file.*is it a bundle"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "cannot read .*safetensors"),
    "no JSON": (lambda b: (b / "bundle.json").write_text("{"), "not a valid manifest: content: In"),
    "no object": (lambda b: (b / "bundle.json").write_text("[1]"), "not a valid manifest"),
    "no UTF-8": (lambda b: (b / "bundle.json").write_bytes(b"\xff"), "not a valid manifest"),
    "huge manifest": (
        lambda b: (b / "bundle.json").write_text(" " * (MANIFEST_LIMIT_BYTES + 1)),
        "is larger than",
    ),
    "unknown key": (_edit(code="import os"), "code: Extra inputs are not permitted"),
    "missing key": (_edit(classes=None), "classes: Field required"),
    "other format": (_edit(format="pickle"), "format: Input should be 'syncbn-bundle'"),
    "later version": (_edit(format_version=3), "format_version: Input should be 1 or 2"),
    "mistyped key": (_edit(classes="abc"), "classes: Input should be a valid"),
    "path as name": (_edit(name="../x"), "name: String should match"),
    "other file": (
        _edit(weights={"file": "/etc/passwd", "sha256": "0" * 64, "size_bytes": 1}),
        "weights.file: Input should be 'model.safetensors'",
    ),
    "zero std": (
        _edit(preprocessing={"scale": 1.0, "mean": [0.0, 0.0], "std": [1.0, 0.0]}),
        "preprocessing.std.1: Input should be greater than",
    ),
    "too few means": (
        _edit(preprocessing={"scale": 1.0, "mean": [0.0], "std": [1.0]}),
        "preprocessing needs 2 values each",
    ),
    "unknown architecture": (
        _edit(architecture={"name": "os.system", "arguments": {}}),
        "unknown architecture 'os.system'",
    ),
    "absurd size": (
        _edit(architecture={"name": "cnn", "arguments": ARGUMENTS | {"width": 10**7}}),
        "tensor '0.weight' should be",
    ),
    "impossible size": (
        _edit(architecture={"name": "cnn", "arguments": ARGUMENTS | {"width": 2**31 - 1}}),
        "architecture 'cnn' cannot be built: RuntimeError",
    ),
    "unbounded size": (
        _edit(architecture={"name": "cnn", "arguments": ARGUMENTS | {"width": 10**30}}),
        "arguments.width.*: Value error, an integer must fit in 64 bits, got 1000000",
    ),
    "long argument": (
        _edit(architecture={"name": "cnn", "arguments": ARGUMENTS | {"width": [1] * 1025}}),
        "arguments.width.* at most 1024 items",
    ),
    "nested argument": (
        _edit(architecture={"name": "cnn", "arguments": ARGUMENTS | {"width": [[1]]}}),
        "architecture.arguments.width",
    ),
    "unbuildable model": (
        _edit(architecture={"name": "torchvision.vit_b_16", "arguments": VIT | {"image_size": 7}}),
        "cannot be built: AssertionError",
    ),
    "immense model of torchvision": (
        _edit(
            architecture={
                "name": "torchvision.regnet_x_8gf",
                "arguments": VIT | {"stem_width": BIG},
            }
        ),
        "cannot be built: RuntimeError|misses tensors",
    ),
    "weights of another model": (
        _edit(architecture={"name": "torchvision.vit_b_16", "arguments": VIT}),
        "misses tensors",
    ),
    "flat input": (
        _edit(input={"name": "image", "shape": [2, 8], "dtype": "float32"}),
        "refuses an input of shape",
    ),
    "unbounded input": (
        _edit(input={"name": "image", "shape": [2, 10**30, 8], "dtype": "float32"}),
        "input.shape.1: Input should be less than",
    ),
    "overflowing preprocessing": (
        _edit(preprocessing={"scale": 1e300, "mean": [0.0, 0.0], "std": [1.0, 1.0]}),
        "preprocessing.scale: Input should be less than",
    ),
    "negative file size": (
        _edit(weights={"file": "model.safetensors", "sha256": "0" * 64, "size_bytes": -2}),
        "weights.size_bytes: Input should be greater than or equal to 0",
    ),
    "unbounded file size": (
        _edit(weights={"file": "model.safetensors", "sha256": "0" * 64, "size_bytes": 10**18}),
        "weights.size_bytes: Input should be less than",
    ),
    "FIFO": (_replace_weights_by_fifo, "model.safetensors is not a regular file"),
    "longer than stated": (
        lambda b: (b / "model.safetensors").write_bytes(b"1" * 10_000),
        "model.safetensors is larger than",
    ),
    "flipped bit": (_flip_a_bit, "has SHA-256 .* copy the bundle again"),
    "truncated": (
        lambda b: (b / "model.safetensors").write_bytes(b"123"),
        "has 3 bytes, but bundle.json states",
    ),
    "no safetensors": (_replace_weights(b"\x80\x04pickle"), "not a safetensors file"),
    "superfluous tensor": (_replace_weights(_state(more=torch.ones(1))), "unknown tensors more"),
    "negative variance": (
        _replace_weights(_state(**{"1.running_var": -torch.ones(4)})),
        "'1.running_var' holds negative values",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_anything_else_is_refused(bundle: Path, damage: Damage, message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle)


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
