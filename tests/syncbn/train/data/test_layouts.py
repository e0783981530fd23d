from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.errors import ConfigError
from syncbn.train.data.checks import IGNORED, kind_of_targets
from syncbn.train.data.datasets import Dataset, load_dataset
from syncbn.train.data.digest import digest
from syncbn.train.data.layouts import voc_palette
from syncbn.train.schema import DigitScenesConfig, MaskFilesConfig, schemas
from tests.syncbn.train.data.test_images import assert_standardized, fetch_all, random_bytes


def _load(name: str, path: Path, validation: float = 0.0, **changes: Any) -> Dataset:
    values: dict[str, Any] = {"batch_size": 2, "workers": 0, "path": str(path), "height": 8}
    values |= {"width": 12, "flip": True, "scale_min": 0.5, "scale_max": 2.0, "skip_damaged": False}
    config = schemas("data")[name](validation=validation, **(values | changes))
    assert isinstance(config, MaskFilesConfig)
    return load_dataset(config, seed=0)


def _pair(image: Path, mask: Path, values: list[int], palette: bool = False) -> None:
    """Write an image, and a mask of which each column has one of the values."""
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_bytes(8, 12, 3)).save(image)
    drawn = Image.fromarray(
        np.array(values, np.uint8)[None, np.arange(12) % len(values)].repeat(8, 0)
    )
    if palette:
        drawn.putpalette([part for color in voc_palette(256) for part in color])
    drawn.save(mask)


def _values(dataset: Dataset, split: str = "validation") -> list[int]:
    """Return the values of the first mask's first row, as evaluated."""
    samples = getattr(dataset, split)
    return samples.plain().__getitems__([(0, 0)])[1][0, 0].tolist()


def _sizes(dataset: Dataset) -> tuple[int, int, int]:
    splits = (dataset.train, dataset.validation, dataset.test)
    return tuple(0 if each is None else len(each) for each in splits)  # pyright: ignore[reportReturnType] -- three


# Folders of images and masks.


def _write_masks(path: Path, *splits: str, values: tuple[int, ...] = (0, 1, 2, 255)) -> None:
    for split in splits:
        for number in range(4 if split == "train" else 2):
            directory = path / split
            _pair(directory / "images" / f"{number}.jpg", directory / "masks" / f"{number}.png",
                  list(values))  # fmt: skip


@pytest.mark.parametrize(
    ("splits", "validation", "sizes"),
    [
        (("train", "val", "test"), 0.25, (4, 2, 2)),
        (("train", "val"), 0.25, (4, 2, 0)),
        (("train", "test"), 0.25, (3, 1, 2)),
        (("train", "test"), 0.0, (4, 0, 2)),
    ],
)
def test_folders_of_images_and_masks_are_splits(
    tmp_path: Path, splits: tuple[str, ...], validation: float, sizes: tuple[int, ...]
) -> None:
    _write_masks(tmp_path, *splits)
    dataset = _load("masks", tmp_path, validation)
    assert _sizes(dataset) == sizes
    assert dataset.classes == ("0", "1", "2")
    assert dataset.palette == voc_palette(3)
    assert dataset.input.shape == (3, 8, 12)
    assert kind_of_targets(dataset) == "masks"
    assert _values(dataset, "train")[:4] == [0, 1, 2, IGNORED]
    assert len(digest(dataset)) == 64
    if dataset.validation is not None:
        first, again = (fetch_all(dataset.validation, epoch) for epoch in (0, 1))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_classes_have_the_names_of_a_file(tmp_path: Path) -> None:
    _write_masks(tmp_path, "train", "val")
    (tmp_path / "classes.txt").write_text("ground\ntree\n\nhouse \nriver\n")
    assert _load("masks", tmp_path).classes == ("ground", "tree", "house", "river")
    (tmp_path / "classes.txt").write_text("ground\ntree\n")
    with pytest.raises(
        ConfigError, match=r"0.png has the pixel value 2, .* allowed are 0 to 1, 255"
    ):
        _load("masks", tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"cannot read .*classes.txt: .* one class a line"):
        _load("masks", tmp_path)


def test_masks_of_0_and_255_are_explained(tmp_path: Path) -> None:
    _write_masks(tmp_path, "train", "val", values=(0, 255))
    with pytest.raises(ConfigError, match=r"hold 0 and 255 alone.* number the classes 0, 1, 2"):
        _load("masks", tmp_path)


def _no_mask(path: Path) -> None:
    (path / "train" / "masks" / "2.png").unlink()


def _no_image(path: Path) -> None:
    (path / "val" / "images" / "1.jpg").unlink()


def _two_images(path: Path) -> None:
    (path / "train" / "images" / "2.png").write_bytes(b"")


def _no_train(path: Path) -> None:
    (path / "train").rename(path / "training")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_no_mask, r"no mask in .*train/masks for 2; images and masks belong together"),
        (_no_image, r"no image in .*val/images for 1; images and masks belong together"),
        (_two_images, r"train/images has several images for 2, with other suffixes"),
        (_no_train, r"no image in .*train/images; there must be .*/train/masks/NAME.png"),
    ],
)
def test_images_and_masks_that_do_not_belong_together_are_named(
    tmp_path: Path, damage: Any, problem: str
) -> None:
    _write_masks(tmp_path, "train", "val")
    damage(tmp_path)
    with pytest.raises(ConfigError, match=f"^data.path={tmp_path}: .*{problem}"):
        _load("masks", tmp_path)


def test_damaged_masks_are_left_out_if_so_configured(tmp_path: Path) -> None:
    _write_masks(tmp_path, "train", "val")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "train" / "masks" / "1.png").write_bytes(b"x")
    assert _sizes(_load("masks", tmp_path, skip_damaged=True)) == (3, 2, 0)


# VOC.


def _write_voc(root: Path) -> None:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", ("2007_1", "2007_2", "2008_1")), ("val", ("2009_1", "2009_2"))):
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            _pair(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png",
                  [0, 15, 20, 255], palette=True)  # fmt: skip


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_read_by_its_directory_or_one_above(tmp_path: Path, below: str) -> None:
    _write_voc(tmp_path / below)
    dataset = _load("voc", tmp_path, validation=0.5)
    assert _sizes(dataset) == (3, 2, 0)
    assert _values(dataset)[:4] == [0, 15, 20, IGNORED]
    assert (len(dataset.classes), dataset.classes[15], dataset.classes[20]) == (
        21,
        "person",
        "tvmonitor",
    )


def test_the_palette_is_that_of_voc() -> None:
    colors = voc_palette(21)
    assert colors[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert (colors[8], colors[15], colors[20]) == ((64, 0, 0), (192, 128, 128), (0, 64, 128))
    assert len(set(voc_palette(256))) == 256


# Cityscapes.


def _write_cityscapes(root: Path) -> None:
    for split, names in (("train", ("a/a_0", "a/a_1", "b/b_0")), ("val", ("c/c_0",))):
        for name in names:
            _pair(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png",
                  root / "gtFine" / split / f"{name}_gtFine_labelIds.png",
                  [7, 8, 33, 0, 29, 255, 26])  # fmt: skip


def test_cityscapes_has_19_classes_of_its_numbers(tmp_path: Path) -> None:
    _write_cityscapes(tmp_path)
    dataset = _load("cityscapes", tmp_path, validation=0.5)
    assert _sizes(dataset) == (3, 1, 0)
    assert _values(dataset)[:7] == [0, 1, 18, IGNORED, IGNORED, IGNORED, 13]
    assert (len(dataset.classes), dataset.classes[13]) == (19, "car")
    assert dataset.palette is not None
    assert dataset.palette[13] == (0, 0, 142)


def test_cityscapes_without_a_mask_is_explained(tmp_path: Path) -> None:
    _write_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/b/b_0_gtFine_labelIds.png").unlink()
    with pytest.raises(ConfigError, match=r"no gtFine/train/b/b_0_gtFine_labelIds.png; get "):
        _load("cityscapes", tmp_path)


# Pets.


def _write_pets(root: Path) -> None:
    for split, names in (("trainval", [f"Abyssinian_{n}" for n in range(10)]), ("test", ["pug_1"])):
        for name in names:
            _pair(root / "images" / f"{name}.jpg", root / "annotations" / "trimaps" / f"{name}.png",
                  [1, 2, 3])  # fmt: skip
        lines = ["#Image CLASS-ID SPECIES BREED ID", *(f"{name} 1 1 1" for name in names)]
        (root / "annotations" / f"{split}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("below", ["", "oxford-iiit-pet"])
def test_pets_are_pet_background_and_outline(tmp_path: Path, below: str) -> None:
    _write_pets(tmp_path / below)
    dataset = _load("pets", tmp_path, validation=0.2)
    assert _sizes(dataset) == (8, 2, 1)
    assert dataset.classes == ("pet", "background", "outline")
    assert _values(dataset, "test")[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("voc", "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"),
        ("cityscapes", "https://www.cityscapes-dataset.com/downloads/"),
        ("pets", "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    ],
)
def test_files_that_are_missing_are_named_with_where_to_get_them(
    tmp_path: Path, name: str, address: str
) -> None:
    with pytest.raises(ConfigError, match=f"^data.path={tmp_path / 'no'}: .*get .*") as raised:
        _load(name, tmp_path / "no")
    assert address in str(raised.value)


# Scenes of digits.


def _scenes(validation: float = 0.1, **changes: Any) -> Dataset:
    values: dict[str, Any] = {"samples": 60, "test_samples": 20, "size": 48, "flip": False}
    values |= {"scale_min": 1.0, "scale_max": 1.0}
    config = DigitScenesConfig(batch_size=2, workers=0, validation=validation, **(values | changes))
    return load_dataset(config, seed=0)


def test_scenes_are_the_same_each_time_and_have_every_class() -> None:
    dataset = _scenes()
    assert digest(dataset) == digest(_scenes())
    assert _sizes(dataset) == (54, 6, 20)
    images, masks = fetch_all(dataset.train)
    assert (images.shape, images.dtype) == ((54, 3, 48, 48), torch.uint8)
    counts = masks.flatten().bincount(minlength=11)
    assert len(counts) == 11
    assert counts.min() > 100
    assert 0.6 < counts[0] / counts.sum() < 0.95
    assert len(dataset.palette or ()) == len(dataset.classes) == 11
    assert_standardized(dataset)
    # Digits are brighter than the ground, which is not flat.
    brightness = images.double().mean(1)
    assert brightness[masks > 0].mean() > 2 * brightness[masks == 0].mean()
    assert brightness[masks == 0].std() > 10


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_no_digit_is_in_scenes_of_two_splits(
    validation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from syncbn.train.data import segmentation

    drawn: list[set[bytes]] = []
    draw = segmentation.draw_scenes

    def note(images: torch.Tensor, *rest: Any) -> Any:
        drawn.append({image.numpy().tobytes() for image in images})
        return draw(images, *rest)

    monkeypatch.setattr(segmentation, "draw_scenes", note)
    assert _sizes(_scenes(validation))[1] == (6 if validation else 0)
    assert len(drawn) == (3 if validation else 2)
    for number, digits in enumerate(drawn):
        for others in drawn[:number]:
            # A few digits are equal in all 64 pixels.
            assert len(digits & others) <= 3


def test_scenes_are_scaled_and_cropped_as_files_are() -> None:
    train = _scenes(scale_min=0.5, scale_max=0.6).train
    _, masks = fetch_all(train)
    assert (masks == IGNORED).double().mean() > 0.4
