from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from syncbn.models import build_model, build_without_memory
from syncbn.transforms.convert import convert_sync_batchnorm
from syncbn.transforms.fold import fold

SIZES: dict[str, Any] = {"in_channels": 2, "num_classes": 5}
SMALL = {**SIZES, "width": 4, "depth": 3}
NAMES = torchvision.models.list_models(module=torchvision.models.segmentation)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (16, 16), (17, 33)])
def test_unet_gives_each_pixel_of_an_image_of_any_size_its_logits(size: tuple[int, int]) -> None:
    model = build_model("unet", SMALL).eval()
    assert model(torch.randn(2, 2, *size)).shape == (2, 5, *size)
    described = build_without_memory("unet", SMALL).eval()
    assert described(torch.empty(1, 2, *size, device="meta")).shape == (1, 5, *size)


@pytest.mark.parametrize("depth", [1, 4])
def test_unet_halves_as_often_as_it_is_deep_and_doubles_its_channels(depth: int) -> None:
    model = build_without_memory("unet", {**SMALL, "depth": depth})
    sizes: list[tuple[int, ...]] = []
    for level in model.get_submodule("encoder.levels").children():
        level.register_forward_hook(lambda *args: sizes.append(args[2].shape))
    model(torch.empty(1, 2, 32, 32, device="meta"))
    assert sizes == [(1, 4 * 2**k, 32 // 2**k, 32 // 2**k) for k in range(depth + 1)]


def test_unet_is_folded_whole() -> None:
    model = build_model("unet", SMALL).double()
    model(torch.randn(4, 2, 16, 16).double())  # other statistics than the first ones
    folding = fold(model)
    assert len(folding.folded) == 14
    assert not folding.kept
    x = torch.randn(2, 2, 9, 11).double()
    torch.testing.assert_close(folding.model(x), model.eval()(x))


@pytest.mark.parametrize("name", ["unet", "torchvision.lraspp_mobilenet_v3_large"])
def test_memory_format_and_conversion_change_no_logits(name: str) -> None:
    model = build_model(name, SMALL if name == "unet" else SIZES).double()
    x = torch.randn(2, 2, 32, 24).double()
    expected: Tensor = model(x)
    convert_sync_batchnorm(model)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it, its stub lacks it
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(
    ("name", "auxiliary"),
    [(name, False) for name in NAMES] + [(name, True) for name in NAMES if "lraspp" not in name],
)
def test_state_of_a_segmentation_model_is_that_of_torchvisions(name: str, auxiliary: bool) -> None:
    more = {"aux_loss": True} if auxiliary else {}
    ours = build_without_memory(f"torchvision.{name}", {"in_channels": 3, "num_classes": 5, **more})
    with torch.device("meta"):
        theirs = torchvision.models.get_model_builder(name)(
            weights=None, weights_backbone=None, num_classes=5, **more
        )
    shapes = [(key, value.shape) for key, value in theirs.state_dict().items()]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == shapes
    x = torch.empty(2, 3, 33, 40, device="meta")
    assert ours.eval()(x).shape == (2, 5, 33, 40)
    outputs = ours.train()(x)
    if auxiliary:
        assert [output.shape for output in outputs] == [(2, 5, 33, 40)] * 2
    else:
        assert outputs.shape == (2, 5, 33, 40)


def test_segmentation_model_computes_what_torchvisions_does() -> None:
    for name, more in (("deeplabv3_mobilenet_v3_large", {"aux_loss": True}), (NAMES[-1], {})):
        ours = build_model(f"torchvision.{name}", {"in_channels": 3, "num_classes": 5, **more})
        builder = torchvision.models.get_model_builder(name)
        theirs = builder(weights=None, weights_backbone=None, num_classes=5, **more)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 33, 40)
        expected = theirs.eval()(x)
        assert torch.equal(ours.eval()(x), expected["out"])
        folding = fold(ours)
        assert set(folding.kept) == ({"aux_classifier.1"} if more else set())
        torch.testing.assert_close(folding.model(x), expected["out"])
