import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.images import read_image
from syncbn.train.data.checks import IGNORED
from syncbn.train.data.masks import FilePairs, Form, MaskedImages, StoredPairs
from syncbn.train.data.sampling import Key
from tests.syncbn.train.data.test_images import Bytes, fetch_all
from tests.syncbn.train.data.test_sampling import loading

VALUES = (0, 1, 2, *[-1] * 252, IGNORED)


def _scene(height: int, width: int) -> tuple[Bytes, Bytes]:
    """Return an image of which each pixel says where it is, and a mask of its quarters."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 4, columns * 4, rows + columns], 2).astype(np.uint8)
    mask = (rows >= height // 2).astype(np.uint8) * 2 + (columns >= width // 2).astype(np.uint8)
    return image, mask % 3


def _stored(count: int = 6, height: int = 40, width: int = 40) -> StoredPairs:
    image, mask = (torch.from_numpy(each) for each in _scene(height, width))
    return StoredPairs(
        image.permute(2, 0, 1).expand(count, -1, -1, -1).contiguous(),
        mask.expand(count, -1, -1).contiguous(),
    )


def _expected(image: Tensor) -> Tensor:
    """Return the mask of a scene of 40×40 from where its pixels say that they were."""
    rows, columns = (image[:, channel].double() / 4 for channel in (0, 1))
    return ((rows >= 19.5) * 2 + (columns >= 19.5).long()) % 3


def test_images_and_masks_are_changed_together() -> None:
    form = Form(3, 32, 32, 0.5, 2.0, True)
    samples = MaskedImages(_stored(), form, seed=0)
    seen: list[Tensor] = []
    for epoch in range(10):
        images, masks = fetch_all(samples, epoch)
        assert (images.dtype, images.shape) == (torch.uint8, (6, 3, 32, 32))
        assert (masks.dtype, masks.shape) == (torch.int64, (6, 32, 32))
        inside = masks != IGNORED
        # What interpolation mixes, at the borders of quarters, and at most so much of it.
        assert (masks == _expected(images))[inside].double().mean() > 0.93
        assert (images.sum(1)[~inside] == 0).all()
        seen.append(inside)
    inside = torch.cat(seen)
    assert 0 < (~inside).double().mean() < 0.5
    assert inside.flatten(1).all(1).any()


def test_scale_part_and_mirror_are_drawn_from_their_whole_ranges() -> None:
    samples = MaskedImages(_stored(400), Form(3, 20, 20, 0.5, 2.0, True), seed=1)
    images, masks = fetch_all(samples)
    # How fast the column runs along the middle row: 2/scale a pixel, of 4 steps; 40 pixels in 20.
    inside = masks[:, 10] != IGNORED
    whole = images[inside.all(1), 1, 10].double()
    slopes = (whole[:, 15] - whole[:, 5]) / 10 / 4
    scales = (2 / slopes.abs()).clamp(0, 9)
    assert scales.min() < 1.1
    assert scales.max() > 1.85
    mirrored = (slopes < 0).double().mean().item()
    assert abs(mirrored - 0.5) < 5 * (0.25 / len(slopes)) ** 0.5
    left = whole.minimum(whole.flip(1))[:, 0] / 4
    assert left.min() < 1
    assert left.max() > 15


def test_without_scaling_a_form_of_the_images_size_shows_them_as_they_are() -> None:
    pairs = _stored()
    for seed in (None, 3):
        images, masks = fetch_all(MaskedImages(pairs, Form(3, 40, 40), seed), epoch=2)
        assert torch.equal(images, pairs.images)
        assert torch.equal(masks, pairs.masks.long())


def test_changes_depend_on_seed_epoch_and_index_alone() -> None:
    form = Form(3, 24, 16, 0.5, 2.0, True)
    samples = MaskedImages(_stored(), form, seed=0)
    whole = [torch.stack([fetch_all(samples, epoch)[part].long() for epoch in range(2)])
             for part in (0, 1)]  # fmt: skip
    assert not torch.equal(whole[0][0], whole[0][1])
    assert not torch.equal(whole[0][0, 0], whole[0][0, 1])
    assert not torch.equal(fetch_all(MaskedImages(_stored(), form, 1))[0], whole[0][0])
    keys: list[Key] = [(1, 4), (0, 2), (0, 0), (1, 4)]
    for workers in (0, 2):
        with loading(samples, [keys[:3], [], keys[3:]], workers) as loader:
            batches = list(loader)
        for part in (0, 1):
            found = torch.cat([batch[part] for batch in batches])
            assert torch.equal(found.long(), torch.stack([whole[part][key] for key in keys]))


def test_none_can_be_asked_for_and_plain_ones_are_not_changed() -> None:
    samples = MaskedImages(_stored(), Form(3, 8, 12, 0.5, 2.0, True), seed=0)
    images, masks = samples.__getitems__([])
    assert (images.shape, masks.shape) == ((0, 3, 8, 12), (0, 8, 12))
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.int64)
    plain = samples.plain()
    assert torch.equal(fetch_all(plain, 0)[0], fetch_all(plain, 1)[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_one_channel_or_three(channels: int) -> None:
    pairs = StoredPairs(
        torch.randint(0, 256, (2, channels, 9, 7), dtype=torch.uint8),
        torch.randint(0, 3, (2, 9, 7), dtype=torch.uint8),
    )
    for seed in (None, 0):
        samples = MaskedImages(pairs, Form(channels, 9, 7, 0.3, 0.4), seed)
        images, masks = fetch_all(samples)
        assert (images.shape, masks.shape) == ((2, channels, 9, 7), (2, 9, 7))
        assert (masks == IGNORED).any() == (seed is not None)


def test_scales_must_be_in_order() -> None:
    with pytest.raises(ConfigError, match=r"data.scale_min=2 is above data.scale_max=1; scales"):
        Form(3, 8, 8, 2.0, 1.0)


# Files.


def _save(file: Path, image: Any, **options: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)
    return str(file)


def _files(tmp_path: Path, mask: Any = None, **options: Any) -> FilePairs:
    image, values = _scene(30, 50)
    files = [(_save(tmp_path / f"{number}.png", image, **options),
              _save(tmp_path / f"mask{number}.png", values if mask is None else mask))
             for number in range(2)]  # fmt: skip
    return FilePairs(files, VALUES, str(tmp_path))


@pytest.mark.parametrize("form", [Form(3, 10, 20), Form(3, 15, 15), Form(3, 64, 16)])
def test_evaluated_images_are_what_serving_reads_and_masks_are_cut_alike(
    tmp_path: Path, form: Form
) -> None:
    pairs = _files(tmp_path)
    images, masks = fetch_all(MaskedImages(pairs, form, None))
    served = read_image(
        (tmp_path / "0.png").read_bytes(), (3, form.height, form.width), max_pixels=10_000
    )
    assert np.array_equal(images[0].numpy(), served)
    rows, columns = (images[:, channel].double() / 4 for channel in (0, 1))
    expected = ((rows >= 14.5) * 2 + (columns >= 24.5).long()) % 3
    assert (expected == masks).double().mean() > 0.9


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_may_have_palettes(tmp_path: Path, mode: str) -> None:
    _, values = _scene(30, 50)
    if mode == "1":
        values = (values > 0).astype(np.uint8)
        mask = Image.fromarray(values * 255).convert("1")
    else:
        mask = Image.fromarray(values)
        if mode == "P":
            mask.putpalette([7, 7, 7, 90, 0, 0, 200, 100, 0])
    _, masks = fetch_all(MaskedImages(_files(tmp_path, mask), Form(3, 30, 50), None))
    assert np.array_equal(masks[0].numpy(), values)


def test_an_image_is_turned_upright_and_its_mask_is_upright(tmp_path: Path) -> None:
    image, values = _scene(30, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.rot90(image).copy()
    file = _save(tmp_path / "a.png", stored, exif=exif)
    pairs = FilePairs([(file, _save(tmp_path / "mask.png", values))], VALUES, str(tmp_path))
    images, masks = fetch_all(MaskedImages(pairs, Form(3, 30, 50), None))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), image)
    assert np.array_equal(masks[0].numpy(), values)


def _mask_of(value: int) -> Bytes:
    return np.full((30, 50), value, np.uint8)


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (_mask_of(3), r"mask0.png has the pixel value 3, .* allowed are 0 to 2, 255$"),
        (np.zeros((30, 49), np.uint8), r"mask0.png has 49×30 pixels; the image .*0.png has 50×30"),
        (np.zeros((30, 50, 3), np.uint8), r"mask0.png: it has Pillow's mode RGB; a mask must"),
        (np.zeros((30, 50), np.uint16), r"mask0.png: it has Pillow's mode I;16; a mask must"),
    ],
)  # fmt: skip
def test_mask_that_does_not_fit_is_named(tmp_path: Path, mask: Bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        _files(tmp_path, mask).read(0)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("name", ["0.png", "mask0.png"])
@pytest.mark.parametrize("damage", [_cut, Path.unlink])
def test_damaged_pairs_are_named_or_left_out(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    pairs = _files(tmp_path)
    damage(tmp_path / name)
    samples = MaskedImages(pairs, Form(3, 8, 8), 0)
    with pytest.raises(ConfigError, match=f"cannot read the image {tmp_path / name}: "):
        fetch_all(samples)
    moved: list[int] = []
    left = samples.without_damaged(lambda: moved.append(1))
    assert len(fetch_all(left)[0]) == 1
    assert len(moved) == 2


def test_files_are_told_by_names_and_sizes(tmp_path: Path) -> None:
    pairs = _files(tmp_path)
    (image, mask), _ = MaskedImages(pairs, Form(3, 8, 8), 0).files()
    assert image == ("0.png", (tmp_path / "0.png").stat().st_size)
    assert mask == ("mask0.png", (tmp_path / "mask0.png").stat().st_size)
    assert len(pairs.part([1])) == 1
    assert MaskedImages(_stored(), Form(3, 8, 8), 0).files() == []


def test_a_mask_is_read_from_any_lossless_file() -> None:
    from syncbn.train.data.masks import read_mask

    content = io.BytesIO()
    Image.fromarray(_mask_of(2)).save(content, "BMP")
    assert np.array_equal(read_mask(content.getvalue()), _mask_of(2))
