import io
import json
import random
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from service.errors import InvalidRequestError
from service.models.images import read_image
from syncbn.bundle import Manifest, read_bundle
from syncbn.train.data.folders import FolderImages
from syncbn.train.schema import FolderConfig

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


def _evaluated(file: Path, size: int = 8) -> Any:
    """Return what training evaluates of a file."""
    config = FolderConfig(
        path=str(file.parent), size=size, batch_size=1, workers=0, flip=False, crop_scale_min=1.0
    )
    return FolderImages([(str(file), 0)], config, None).__getitems__([(0, 0)])[0][0].numpy()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(40, 40), (51, 30), (30, 51), (5, 5), (90, 7), (99, 98)])
def test_image_of_another_size_is_what_training_evaluates(
    tmp_path: Path, size: tuple[int, int], form: str
) -> None:
    file = tmp_path / "image"
    file.write_bytes(_file(_noise(*size), form))
    np.testing.assert_array_equal(_read(file.read_bytes()), _evaluated(file))


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


def test_palette_with_degrees_of_transparency_is_what_training_reads() -> None:
    palette = _noise(8, 8).quantize(16)
    content = _file(palette, transparency=bytes(range(0, 160, 10)))
    shown = palette.convert("RGB")
    np.testing.assert_allclose(_read(content), _read(_file(shown)))
    grey = _read(content, (1, 8, 8))
    np.testing.assert_allclose(grey, _read(_file(shown), (1, 8, 8)), rtol=0, atol=1.001)
    alpha = np.asarray(palette) * 10.0
    np.testing.assert_allclose(_read(content, (4, 8, 8))[3], np.where(alpha < 160, alpha, 255))


def test_image_for_print_is_coloured() -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    sample = _read(_file(image.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(sample[:, 4, 4], (200, 100, 50), atol=4)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_image_counts(form: str) -> None:
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (40, 200)]
    options: dict[str, Any] = {} if form == "PNG" else {"lossless": True}
    content = _file(images[0], form, save_all=True, append_images=images[1:], **options)
    np.testing.assert_allclose(_read(content)[0], 40)


def test_files_may_be_read_in_several_threads() -> None:
    contents = [_file(_noise(40 + n, 30), form) for n in range(8) for form in ("PNG", "WEBP")]
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(_read, contents, timeout=30))
    for content, sample in zip(contents, samples, strict=True):
        np.testing.assert_array_equal(sample, _read(content))


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_the_same_in_training_and_serving(
    tmp_path: Path, orientation: int, form: str
) -> None:
    """A camera held otherwise stores another array and says how to turn it; both do."""
    upright = _noise(50, 30).resize((100, 60), Image.Resampling.BICUBIC)
    undone = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undone[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100} if form == "JPEG" else {}
    options |= {"lossless": True} if form == "WEBP" else {}
    file = tmp_path / "image"
    file.write_bytes(_file(stored, form, exif=exif, **options))
    expected = _read(_file(upright))
    np.testing.assert_allclose(
        _read(file.read_bytes()), expected, rtol=0, atol=12 if form == "JPEG" else 0
    )
    np.testing.assert_array_equal(_read(file.read_bytes()), _evaluated(file))
    changed = FolderImages(
        [(str(file), 0)],
        FolderConfig(path="", size=60, batch_size=1, workers=0, flip=False, crop_scale_min=1.0),
        0,
    )
    # The whole area is seen, to the proportions from 3/4 to 4/3 that training draws.
    image = changed.__getitems__([(0, 0)])[0][0].double()
    whole = torch.from_numpy(np.asarray(upright.resize((60, 60)), np.float64)).permute(2, 0, 1)
    errors = [float((image - turned).abs().mean()) for turned in _turned(whole)]
    assert errors.index(min(errors)) == 0


def _turned(image: torch.Tensor) -> list[torch.Tensor]:
    """Return a square image in its eight orientations, upright first."""
    turned = [image.rot90(number, (1, 2)) for number in range(4)]
    return turned + [each.flip(2) for each in turned]


# Opening a JPEG file reads its EXIF part already; the service logs what is said of that.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_image_with_a_broken_orientation_is_read_as_it_is() -> None:
    image = _noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = _file(image, "JPEG", exif=exif)
    at = whole.index(b"Exif\0\0") + 6
    upright = _read(_file(image, "JPEG"))
    for place in range(at, at + 8):  # the header: byte order, its check, where the tags are
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        np.testing.assert_array_equal(_read(bytes(broken)), upright)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a PNG, JPEG or WebP image"),
        (b"GIF89a", "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(8, 8), "GIF"), "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(8, 8), "TIFF"), "cannot be read as a PNG, JPEG or WebP image"),
        (_file(_noise(60, 60))[:-200], "cannot be read as a PNG"),
        (_file(_noise(101, 100)), "has 101×100 pixels; at most 10000 are read"),
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


def _png_header(width: int, height: int) -> bytes:
    content = bytearray(_file(Image.new("L", (1, 1))))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _webp_header(width: int, height: int) -> bytes:
    content = bytearray(_file(Image.new("RGBA", (1, 1), (1, 2, 3, 4)), "WEBP", exif=b"Exif"))
    assert content[12:16] == b"VP8X"
    content[24:27] = (width - 1).to_bytes(3, "little")
    content[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Pillow warns of the first two as it opens them, and refuses the last by itself.
        (_png_header(10_000, 10_000), "has 10000×10000 pixels; at most 10000 are read"),
        (_png_header(13_000, 13_000), "has 13000×13000 pixels; at most 10000 are read"),
        (_png_header(2**31 - 1, 2**31 - 1), "pixels; at most 10000 are read"),
        (_webp_header(16_000, 16_000), "pixels; at most 10000 are read"),
    ],
    ids=["100 MP", "169 MP", "largest", "WebP"],
)
def test_image_that_is_far_too_large_is_refused_by_our_limit_without_a_warning(
    content: bytes, message: str
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(InvalidRequestError) as refusal:
            _read(content, name="a.png")
    assert not warned
    assert message in str(refusal.value)


def test_limit_may_be_above_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    content = _file(_noise(60, 50))
    expected = _read(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # above twice this, it refuses
    np.testing.assert_array_equal(_read(content), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-300, 3e38])
def test_scale_of_any_size_is_no_failure(scale: float) -> None:
    sample = read_image(_file(_noise(8, 8)), _manifest((3, 8, 8), scale), max_pixels=64)
    assert not np.isnan(sample).any()


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
