from typing import Any

import pytest
import torch
from torch import nn

from syncbn.errors import ModelError
from syncbn.models import ARCHITECTURES, build_model

SIZES: dict[str, Any] = {"in_channels": 1, "num_classes": 10}


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_classifies_small_images(name: str, norm: str) -> None:
    model = build_model(name, {**SIZES, "norm": norm})
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("norm", "layers"), [("batch", 4), ("none", 0)])
def test_convolutions_have_a_bias_only_without_batch_normalization(norm: str, layers: int) -> None:
    modules = list(build_model("cnn", {**SIZES, "norm": norm}).modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == layers
    for module in modules:
        if isinstance(module, nn.Conv2d):
            assert (module.bias is None) == (norm == "batch")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg", SIZES, "unknown architecture 'vgg'; choose one of cnn"),
        ("cnn", {**SIZES, "depth": 3}, "no argument 'depth'; it takes in_channels, num_classes"),
        ("cnn", {"in_channels": 1}, "needs num_classes"),
        ("cnn", {**SIZES, "width": "wide"}, "'width' .* must be of type int, got 'wide'"),
        ("cnn", {**SIZES, "width": 2.5}, "'width' .* must be of type int, got 2.5"),
        ("cnn", {**SIZES, "width": True}, "'width' .* must be of type int, got True"),
        ("cnn", {**SIZES, "width": 0}, "'width' .* must be positive, got 0"),
        ("cnn", {**SIZES, "eps": -1.0}, "'eps' .* must be 0 or more, and finite, got -1.0"),
        ("cnn", {**SIZES, "norm": "layer"}, "'norm' .* must be one of batch, none, got 'layer'"),
    ],
)
def test_unfit_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, arguments)
