import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from syncbn.errors import ConfigError, DataError
from syncbn.train.data.datasets import load_dataset
from syncbn.train.data.sampling import Key
from syncbn.train.schema import FolderConfig
from tests.syncbn.train.data.test_images import Bytes, fetch_all, random_bytes
from tests.syncbn.train.data.test_sampling import loading


def _save(file: Path, pixels: Bytes) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def _folder(path: Path, **changes: Any) -> FolderConfig:
    values: dict[str, Any] = {"size": 16, "flip": False, "crop_scale_min": 1.0, "workers": 0}
    return FolderConfig(batch_size=2, path=str(path), **(values | changes))


def _write_folder(path: Path, held_out: str = "test", count: int = 3) -> dict[str, Bytes]:
    """Write square images of two classes; return those for training by their names."""
    written: dict[str, Bytes] = {}
    for name in ("cat", "dog"):
        for number in range(count):
            written[f"{name}{number}"] = random_bytes(16, 16, 3)
            _save(path / "train" / name / f"{number}.png", written[f"{name}{number}"])
        _save(path / held_out / name / "0.png", random_bytes(16, 16, 3))
    return written


def _as_array(image: Tensor) -> Bytes:
    return image.permute(1, 2, 0).numpy()


def test_folders_are_classes(tmp_path: Path) -> None:
    written = _write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    dataset = load_dataset(_folder(tmp_path), seed=0)
    images, labels = fetch_all(dataset.train)
    assert dataset.classes == ("cat", "dog")
    assert (labels.tolist(), labels.dtype) == ([0, 0, 0, 1, 1, 1], torch.int64)
    assert dataset.test is not None
    assert len(dataset.test) == 2
    assert dataset.input.shape == (3, 16, 16)
    # Of a square image, a crop of its whole area is the image.
    assert images.dtype == torch.uint8
    for image, pixels in zip(images, written.values(), strict=True):
        assert np.array_equal(_as_array(image), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    _write_folder(tmp_path)
    image = Image.fromarray(random_bytes(16, 16, 3)).convert(mode)
    image.save(tmp_path / "train" / "cat" / "0.png")
    images, _ = fetch_all(load_dataset(_folder(tmp_path), seed=0).train)
    assert np.array_equal(_as_array(images[0]), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("upright", [True, False])
def test_test_images_are_the_middle_of_the_resized_image(tmp_path: Path, upright: bool) -> None:
    _write_folder(tmp_path)
    pixels = random_bytes(16, 26, 3)
    middle = pixels[:, 5:21]
    if upright:
        pixels, middle = pixels.transpose(1, 0, 2).copy(), middle.transpose(1, 0, 2)
    _save(tmp_path / "test" / "cat" / "0.png", pixels)
    # Flat areas stay what they are when they become smaller.
    flat = np.repeat(np.repeat(np.array([[10, 200], [90, 50]], np.uint8), 64, 0), 64, 1)
    _save(tmp_path / "test" / "dog" / "0.png", np.stack([flat] * 3, 2))
    dataset = load_dataset(_folder(tmp_path, flip=True, crop_scale_min=0.1), seed=0)
    for epoch in range(3):
        images, _ = fetch_all(dataset.test, epoch)
        assert np.array_equal(_as_array(images[0]), middle)
        assert images[1, 0, ::15, ::15].tolist() == [[10, 200], [90, 50]]


def test_training_images_are_mirrored_half_of_the_time_if_at_all(tmp_path: Path) -> None:
    pixels = _write_folder(tmp_path)["cat0"]
    mirrored: list[bool] = []
    samples = load_dataset(_folder(tmp_path, flip=True), seed=0).train
    for epoch in range(200):
        image = _as_array(samples.__getitems__([(epoch, 0)])[0][0])
        mirrored.append(not np.array_equal(image, pixels))
        assert np.array_equal(image, pixels[:, ::-1] if mirrored[-1] else pixels)
    assert 65 <= sum(mirrored) <= 135  # five deviations


def test_training_sees_random_parts_of_the_configured_area(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    # A pixel tells where it is, so that a part tells which.
    rows, columns = np.mgrid[0:64, 0:64].astype(np.uint8)
    _save(tmp_path / "train" / "cat" / "0.png", np.stack([rows, columns, rows], 2))
    samples = load_dataset(_folder(tmp_path, size=64, crop_scale_min=0.3), seed=0).train
    areas: list[float] = []
    for epoch in range(100):
        image = samples.__getitems__([(epoch, 0)])[0][0].double()
        height, width = (float(channel.max() - channel.min()) + 1 for channel in image[:2])
        areas.append(height * width / 64**2)
        # A pixel more or less for rounding, and one for interpolation at the edges.
        assert (width + 2) / (height - 2) > 3 / 4
        assert (width - 2) / (height + 2) < 4 / 3
        assert torch.all(image[0].diff(dim=0) >= 0)
    assert 0.25 < min(areas) < 0.4
    assert 0.85 < max(areas) <= 1
    assert len(set(areas)) > 50


def test_part_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    config = _folder(tmp_path, flip=True, crop_scale_min=0.2)
    samples = load_dataset(config, seed=0).train
    state = torch.get_rng_state()
    whole = torch.stack([fetch_all(samples, epoch)[0] for epoch in range(2)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(fetch_all(load_dataset(config, seed=1).train)[0], whole[0])
    keys: list[Key] = [(1, 4), (0, 2), (0, 0), (1, 4), (1, 5)]
    images, labels = samples.__getitems__(keys)
    assert torch.equal(images, torch.stack([whole[key] for key in keys]))
    assert labels.tolist() == [1, 0, 0, 1, 1]
    with loading(samples, [keys[:2], [], keys[2:]], workers=2) as loader:
        assert torch.equal(torch.cat([loaded for loaded, _ in loader]), images)


def test_loading_images_leaves_the_generators_of_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_folder(tmp_path)
    samples = load_dataset(_folder(tmp_path, flip=True), seed=0).train
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    fetch_all(samples)
    assert seeded == []


def test_none_of_the_files_can_be_asked_for(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    images, labels = load_dataset(_folder(tmp_path), seed=0).train.__getitems__([])
    assert (images.shape, images.dtype) == ((0, 3, 16, 16), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _remove(file: Path) -> None:
    file.unlink()


def _huge(file: Path) -> None:
    """Claim more pixels than Pillow reads, for fear of what they take."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">2I", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _empty,
        _remove,
        _huge,
    ],
)
def test_image_that_cannot_be_read_is_named(
    tmp_path: Path, damage: Callable[[Path], None], workers: int
) -> None:
    _write_folder(tmp_path)
    samples = load_dataset(_folder(tmp_path), seed=0).train
    file = tmp_path / "train" / "dog" / "1.png"
    damage(file)
    with (
        loading(samples, [[(0, 0)], [(0, 3), (0, 4)]], workers) as loader,
        pytest.raises(
            DataError, match=f"^cannot read the image {file}: .*data.skip_damaged=true$"
        ) as raised,
    ):
        list(loader)
    assert "Traceback" not in str(raised.value)


def test_first_images_are_tried_before_training(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    file = tmp_path / "test" / "cat" / "0.png"
    _cut(file)
    with pytest.raises(ConfigError, match=f"cannot read the image {file}"):
        load_dataset(_folder(tmp_path), seed=0)


@pytest.mark.parametrize("damage", [_cut, _empty, _huge])
def test_damaged_images_are_left_out_and_logged_if_so_configured(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    _write_folder(tmp_path)
    for name in ("train/dog/1.png", "test/cat/0.png"):
        damage(tmp_path / name)
    moved: list[int] = []
    config = _folder(tmp_path, skip_damaged=True)
    dataset = load_dataset(config, seed=0, moves=lambda: moved.append(1))
    assert fetch_all(dataset.train)[1].tolist() == [0, 0, 0, 1, 1]
    assert fetch_all(dataset.test)[1].tolist() == [1]
    assert len(moved) == 8
    (train, test) = caplog.messages
    assert "1 of 6 samples are left out" in train
    assert str(tmp_path / "train/dog/1.png") in train
    assert "1 of 2 samples are left out" in test


def test_a_class_that_is_damaged_altogether_is_refused(tmp_path: Path) -> None:
    _write_folder(tmp_path, count=1)
    _cut(tmp_path / "train" / "dog" / "0.png")
    with pytest.raises(ConfigError, match=r"no training image of dog can be read; repair one"):
        load_dataset(_folder(tmp_path, skip_damaged=True), seed=0)


@pytest.mark.parametrize(
    ("suffix", "dtype", "mode"),
    [("png", np.uint16, "I;16"), ("tif", np.int32, "I"), ("tif", np.float32, "F")],
)
def test_image_of_more_than_8_bits_is_refused_rather_than_clipped(
    tmp_path: Path, suffix: str, dtype: Any, mode: str
) -> None:
    from PIL import Image

    _write_folder(tmp_path)
    file = tmp_path / "train" / "cat" / f"0.{suffix}"
    file.with_suffix(".png").unlink()
    Image.fromarray(np.full((16, 16), 30000, dtype)).save(file)
    with pytest.raises(
        ConfigError, match=rf"{file}: it has more than 8 bits .*mode {mode}.*store it"
    ):
        load_dataset(_folder(tmp_path), seed=0)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 3), (60000, 1, 3), (1, 60000, 3)])
def test_images_of_any_size_are_brought_to_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _write_folder(tmp_path)
    for split in ("train", "test"):
        _save(tmp_path / split / "cat" / "0.png", random_bytes(*shape))
    dataset = load_dataset(_folder(tmp_path, size=64, crop_scale_min=0.5), seed=0)
    for samples in (dataset.train, dataset.test):
        assert samples is not None
        images, _ = samples.__getitems__([(0, 0)])
        assert (images.shape, images.dtype) == ((1, 3, 64, 64), torch.uint8)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_lacks_is_refused(tmp_path: Path, split: str) -> None:
    _write_folder(tmp_path)
    _save(tmp_path / split / "horse" / "0.png", random_bytes(16, 16, 3))
    with pytest.raises(
        ConfigError, match=rf"data.path={tmp_path}: horse is in {tmp_path / split} and not in "
    ):
        load_dataset(_folder(tmp_path), seed=0)
    for number in range(6):
        _save(tmp_path / split / f"bird{number}" / "0.png", random_bytes(16, 16, 3))
    with pytest.raises(ConfigError, match=r": bird0, .*, bird4 and 2 more is in "):
        load_dataset(_folder(tmp_path), seed=0)


def test_a_class_without_test_images_keeps_its_place(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    (tmp_path / "test" / "cat" / "0.png").unlink()
    (tmp_path / "test" / "cat").rmdir()
    dataset = load_dataset(_folder(tmp_path), seed=0)
    assert dataset.classes == ("cat", "dog")
    assert dataset.test is not None
    assert fetch_all(dataset.test)[1].tolist() == [1]


def test_a_class_directory_that_is_not_utf8_is_refused_before_training(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    _save(tmp_path / "train" / name / "0.png", random_bytes(16, 16, 3))
    with pytest.raises(ConfigError, match=r"caf\\xe9' is not UTF-8.*rename") as raised:
        load_dataset(_folder(tmp_path), seed=0)
    str(raised.value).encode()


def _no_train(path: Path) -> None:
    (path / "train").rename(path / "training")


def _no_test(path: Path) -> None:
    (path / "test").rename(path / "testing")


def _no_image(path: Path) -> None:
    for file in (path / "train" / "dog").iterdir():
        file.unlink()


def _file_for_folder(path: Path) -> None:
    _no_train(path)
    (path / "train").touch()


@pytest.mark.parametrize(
    "damage",
    [
        _no_train,
        _no_test,
        _no_image,
        _file_for_folder,
    ],
)
def test_folders_that_are_not_there_are_explained(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    _write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.path={tmp_path}: there must be .*/train/CLASS"):
        load_dataset(_folder(tmp_path), seed=0)
