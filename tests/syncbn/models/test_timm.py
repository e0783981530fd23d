import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.bundle import (
    Architecture,
    Description,
    InputSpec,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from syncbn.errors import ModelError
from syncbn.models import build_model, build_without_memory
from syncbn.transforms.convert import convert_sync_batchnorm
from syncbn.transforms.fold import fold

SIZES: dict[str, Any] = {"in_channels": 2, "num_classes": 5}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto"])
def test_classifier_takes_any_channels_and_classes(name: str) -> None:
    model = build_without_memory(f"timm.{name}", SIZES).eval()
    assert model(torch.empty(1, 2, 64, 64, device="meta")).shape == (1, 5)


def test_arguments_reach_timm() -> None:
    model = build_without_memory("timm.resnet18", {**SIZES, "output_stride": 8})
    assert model.get_submodule("layer4.0.conv1").stride == (1, 1)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_encoder_in_a_unet_gives_each_pixel_its_logits(name: str, depth: int) -> None:
    arguments = {**SIZES, "width": 4, "depth": depth}
    model = build_without_memory(f"unet.timm.{name}", arguments).eval()
    for size in ((64, 64), (33, 50)):
        assert model(torch.empty(2, 2, *size, device="meta")).shape == (2, 5, *size)


def test_encoder_whose_channels_come_last_fits_too() -> None:
    arguments = {**SIZES, "width": 4}
    model = build_without_memory("unet.timm.swin_tiny_patch4_window7_224", arguments).eval()
    assert model(torch.empty(1, 2, 224, 224, device="meta")).shape == (1, 5, 224, 224)


def test_unet_on_timms_encoder_is_converted_and_folded() -> None:
    model = build_model("unet.timm.resnet18", {**SIZES, "width": 4}).double()
    x = torch.randn(2, 2, 33, 40).double()
    expected = model(x)
    torch.testing.assert_close(convert_sync_batchnorm(model)(x), expected)
    folding = fold(model)
    assert len(folding.folded) > 20
    assert not folding.kept
    torch.testing.assert_close(folding.model(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm.resnet19", {}, "unknown architecture 'timm.resnet19'; .*did you mean 'timm.resnet1"),
        ("unet.timm.resnt18", {}, "did you mean 'unet.timm.resnet18' or "),
        ("timm.hf-hub:a/b", {}, "is an import path, which is refused"),
        ("timm.resnet18", {"pretrained": True}, "'pretrained' here: .* starts from random weights"),
        ("timm.resnet18", {"features_only": True}, "no argument 'features_only' here"),
        ("timm.resnet18", {"blocks": 3}, "cannot be built: TypeError: .*blocks"),
        ("unet.timm.resnet18", {"blocks": 3}, "takes no argument 'blocks'; it takes width, depth"),
        ("unet.timm.resnet18", {"depth": 6}, "'unet.timm.resnet18' cannot be built: "),
    ],
)
def test_unfit_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        build_model(name, {**SIZES, **arguments})


def test_missing_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"needs timm \(.*\); pip install 'syncbn\[timm\]'$"):
        build_model("timm.resnet18", SIZES)


def test_bundle_of_a_classifier_is_read_back(tmp_path: Path) -> None:
    model = build_model("timm.resnet10t", SIZES).eval()
    description = Description(
        name="timm",
        architecture=Architecture(name="timm.resnet10t", arguments=SIZES),
        input=InputSpec(name="image", shape=(2, 32, 32), dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0, 0.0), std=(1.0, 1.0)),
        classes=tuple("abcde"),
        metrics={},
        config_sha256="0" * 64,
    )
    write_bundle(tmp_path / "bundle", description, model)
    x = torch.randn(3, 2, 32, 32)
    assert torch.equal(read_bundle(tmp_path / "bundle").model(x), model(x))
