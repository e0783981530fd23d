import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torchvision.transforms import v2

from service.errors import InvalidRequestError
from service.images import read_image
from syncbn.bundle import Manifest, read_bundle

PREDICT = "/predict/shapes"


def _manifest(shape: tuple[int, ...], scale: float = 1 / 255) -> Manifest:
    content = {
        "format": "syncbn-bundle",
        "format_version": 1,
        "name": "m",
        "architecture": {"name": "cnn", "arguments": {}},
        "input": {"name": "image", "shape": shape, "dtype": "float32"},
        "preprocessing": {"scale": scale, "mean": [0.0] * shape[0], "std": [1.0] * shape[0]},
        "classes": ["a"],
        "metrics": {},
        "config_sha256": "0" * 64,
        "weights": {"file": "model.safetensors", "sha256": "0" * 64, "size_bytes": 0},
        "versions": {"syncbn": "0", "torch": "0"},
    }
    return Manifest.model_validate_json(json.dumps(content))


def _file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, mode)


def _read(content: bytes, shape: tuple[int, ...] = (3, 8, 8), **options: Any) -> Any:
    return read_image(content, _manifest(shape), max_pixels=10_000, **options)


@pytest.mark.parametrize("scale", [1 / 255, 1 / 16, 1.0])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_image_of_the_models_size_is_taken_as_it_is(mode: str, channels: int, scale: float) -> None:
    image = _noise(8, 6, mode)
    sample = read_image(_file(image), _manifest((channels, 6, 8), scale), max_pixels=48)
    assert (sample.shape, sample.dtype) == ((channels, 6, 8), np.float32)
    pixels = np.asarray(image, np.float64).reshape(6, 8, channels).transpose(2, 0, 1)
    np.testing.assert_allclose(sample * scale, pixels / 255, rtol=1e-6)


@pytest.mark.parametrize("size", [(40, 40), (51, 30), (30, 51), (5, 5), (90, 7)])
def test_image_of_another_size_is_what_training_evaluates(size: tuple[int, int]) -> None:
    image = _noise(*size)
    tensor = v2.functional.pil_to_tensor(image)
    side = min(size)
    cropped = v2.functional.center_crop(tensor, [side, side])
    expected = v2.functional.resize(cropped, [8, 8], antialias=True).numpy()
    # Both round to whole values.
    np.testing.assert_allclose(_read(_file(image)), expected, rtol=0, atol=1.001)


def test_grey_image_is_coloured_and_a_coloured_one_made_grey_as_the_model_wants() -> None:
    grey = _noise(8, 8, "L")
    coloured = _read(_file(grey))
    np.testing.assert_array_equal(coloured, np.broadcast_to(coloured[:1], (3, 8, 8)))
    sample = _read(_file(_noise(8, 8)), (1, 8, 8))
    np.testing.assert_allclose(sample[0], np.asarray(_noise(8, 8).convert("L")), atol=1e-4)


def test_palettes_and_transparency_are_shown_as_they_are_stored() -> None:
    image = _noise(8, 8)
    transparent = image.copy()
    transparent.putalpha(0)
    np.testing.assert_allclose(_read(_file(transparent)), _read(_file(image)))
    palette = image.quantize(16)
    np.testing.assert_allclose(_read(_file(palette)), _read(_file(palette.convert("RGB"))))


@pytest.mark.parametrize(
    ("form", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_other_formats_are_read(form: str, options: dict[str, Any]) -> None:
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    sample = _read(_file(image, form, **options))
    np.testing.assert_allclose(sample[:, 4, 4], (200, 100, 50), atol=3)


def test_image_is_turned_as_the_camera_was_held() -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sample = _read(_file(image, "JPEG", exif=exif, quality=100), (1, 8, 8))
    assert sample[0, :, 5:].mean() > 250
    assert sample[0, :, :3].mean() < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a PNG, JPEG or WebP image"),
        (b"GIF89a", "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(8, 8), "GIF"), "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(8, 8), "TIFF"), "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(60, 60))[:-200], "cannot be read as a PNG"),
        (_file(_noise(101, 100)), "has 101×100 pixels; send at most 10000"),
        (_file(Image.new("I;16", (8, 8))), "more than 8 bits a channel (Pillow's mode I;16)"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        _read(content, name="a.png")
    assert "'a.png'" in str(refusal.value)
    assert message in str(refusal.value)


def test_image_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    # 60 MB of pixels in a few kilobytes.
    content = _file(Image.new("1", (8_000, 8_000)))
    assert len(content) < 20_000
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InvalidRequestError):
        read_image(content, _manifest((1, 8, 8)), max_pixels=50_000_000)


@pytest.mark.parametrize("shape", [(2, 8, 8), (8,), (3, 8), (3, 8, 8, 8)])
def test_model_that_takes_no_images_says_so(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="model 'm' takes no images, but inputs of shape"):
        _read(_file(_noise(8, 8)), shape)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_read_or_refused(form: str) -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = _file(_noise(24, 24), form, exif=exif)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            sample = _read(bytes(damaged))
        except InvalidRequestError:
            continue
        assert sample.shape == (3, 8, 8)


# The route


def test_files_are_answered_with_their_classes_in_order(client: TestClient, models: Path) -> None:
    images = [_noise(4, 4, "L"), Image.new("L", (4, 4), 255), Image.new("L", (9, 9), 7)]
    files = [("files", (f"{n}.png", _file(image))) for n, image in enumerate(images)]
    answer = client.post(PREDICT, files=files)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model_name"], body["model_version"]) == ("shapes", "1")
    bundle = read_bundle(models / "one")
    for image, prediction in zip(images, body["predictions"], strict=True):
        sample = read_image(_file(image), bundle.manifest, max_pixels=100)
        expected = bundle.probabilities(torch.from_numpy(sample[None]))[0].tolist()
        assert list(prediction["probabilities"]) == list(bundle.manifest.classes)
        assert list(prediction["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert prediction["probability"] == max(prediction["probabilities"].values())
        assert prediction["probabilities"][prediction["label"]] == prediction["probability"]
    assert client.post(f"{PREDICT}/versions/1", files=files).json() == body


def test_image_may_be_the_body(client: TestClient) -> None:
    content = _file(_noise(4, 4, "L"))
    answer = client.post(PREDICT, content=content, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    assert answer.json() == client.post(PREDICT, files={"files": ("a", content)}).json()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"content": b"x"}, 400, "got Content-Type ''"),
        ({"json": {}}, 400, "got Content-Type 'application/json'"),
        (
            {"files": {"image": b"x"}},
            400,
            "no files in the field 'files'; its fields are ['image']",
        ),
        ({"data": {"files": "x"}, "files": {"y": b"x"}}, 400, "no files in the field 'files'"),
        ({"files": {"files": ("a.png", b"x")}}, 400, "'a.png' cannot be read as a PNG"),
        ({"files": [("files", b"x")] * 101}, 400, "the form cannot be read: Too many files"),
        ({"files": {"files": bytes(100_001)}}, 413, "larger than 100000 bytes"),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "the form cannot be read: Missing boundary",
        ),
        (
            {
                "content": b"x",
                "headers": {"Content-Type": "multipart/form-data; boundary=y"},
            },
            400,
            "",
        ),
    ],
)
def test_wrong_form_is_refused(
    client: TestClient, options: dict[str, Any], status: int, message: str
) -> None:
    answer = client.post(PREDICT, **options)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_unknown_model_costs_no_body(client: TestClient) -> None:
    answer = client.post("/predict/cars", content=b"x")
    assert answer.status_code == 404
    assert re.search("no model 'cars'", answer.json()["error"])
