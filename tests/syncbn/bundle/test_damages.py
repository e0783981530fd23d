"""Whatever is wrong with a bundle is refused with the reason."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from syncbn.bundle import MANIFEST_LIMIT_BYTES, read_bundle, write_bundle
from syncbn.errors import BundleError
from syncbn.models import build_model
from tests.support.describe import ARGUMENTS, describe, edit_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", describe(), build_model("cnn", ARGUMENTS))
    return tmp_path / "bundle"


Damage = Callable[[Path], object]


def _edit(**changes: Any) -> Damage:
    """Return a function that sets keys of a bundle's manifest; None removes one."""

    return lambda bundle: edit_manifest(bundle, **changes)


def _replace_weights(state: dict[str, torch.Tensor] | bytes) -> Damage:
    """Return a function that puts other weights into a bundle, with a manifest that fits them."""

    def replace(bundle: Path) -> None:
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
