import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data.datasets import FASHION_CLASSES, Dataset, load_dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Key, Samples, TrainingShare
from syncbn.train.schema import FashionMnistConfig, MnistConfig
from tests.syncbn.train.data.test_sampling import loading

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
CHANCE = np.random.default_rng(0)


def random_bytes(*shape: int) -> Bytes:
    return CHANCE.integers(0, 256, shape, dtype=np.uint8)


def fetch_all(samples: Samples | None, epoch: int = 0) -> tuple[Tensor, Tensor]:
    assert samples is not None
    return samples.__getitems__([(epoch, index) for index in range(len(samples))])


def assert_standardized(dataset: Dataset) -> None:
    inputs = dataset.preprocessing.apply(fetch_all(dataset.train)[0])
    assert inputs.shape[1:] == dataset.input.shape
    assert (dataset.input.name, dataset.input.dtype) == ("image", "float32")
    for channel in inputs.unbind(1):
        assert abs(channel.mean().item()) < 1e-3
        assert abs(channel.std().item() - 1) < 1e-3


# What is random about images in memory.


def _images(
    crop_padding: int, flip: bool, seed: int = 0, shape: tuple[int, ...] = (60, 2, 5, 7)
) -> TensorImages:
    samples = torch.randint(1, 256, shape, dtype=torch.uint8)
    return TensorImages(samples, torch.arange(len(samples)), seed, crop_padding, flip)


def _candidates(image: Tensor, padding: int) -> dict[tuple[int, int, bool], Tensor]:
    """Return what crop and mirror can make of an image, pixel by pixel."""
    _, height, width = image.shape
    found: dict[tuple[int, int, bool], Tensor] = {}
    for down in range(-padding, padding + 1):
        for right in range(-padding, padding + 1):
            moved = torch.zeros_like(image)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + down < height and 0 <= x + right < width:
                        moved[:, y, x] = image[:, y + down, x + right]
            found[down, right, False] = moved
            found[down, right, True] = torch.stack(
                [moved[:, :, width - 1 - x] for x in range(width)], 2
            )
    return found


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (1, False), (2, True)])
def test_images_are_cropped_from_zero_padding_and_mirrored_evenly(padding: int, flip: bool) -> None:
    images = _images(padding, flip)
    counts: dict[tuple[int, int, bool], int] = {}
    epochs = 20
    candidates = [_candidates(image, padding) for image in images.samples]
    for epoch in range(epochs):
        changed, labels = fetch_all(images, epoch)
        assert changed.dtype == torch.uint8
        assert changed.is_contiguous()
        assert torch.equal(labels, images.labels)
        for image, known in zip(changed, candidates, strict=True):
            (how,) = [how for how, other in known.items() if torch.equal(image, other)]
            counts[how] = counts.get(how, 0) + 1
    ways = (2 * padding + 1) ** 2 * (2 if flip else 1)
    mean = epochs * len(images) / ways
    assert len(counts) == ways
    # χ² over the ways, which has about this mean and deviation if all are as likely.
    statistic = sum((count - mean) ** 2 / mean for count in counts.values())
    assert abs(statistic - (ways - 1)) < 5 * (2 * (ways - 1)) ** 0.5


def test_images_without_changes_are_as_stored() -> None:
    images = _images(0, False)
    assert torch.equal(fetch_all(images, epoch=9)[0], images.samples)


def test_float_images_are_changed_likewise() -> None:
    images = _images(2, True)
    floats = TensorImages(images.samples.float(), images.labels, 0, 2, True)
    assert torch.equal(fetch_all(floats)[0], fetch_all(images)[0].float())


def test_change_depends_on_seed_epoch_and_index_alone() -> None:
    images = _images(3, True)
    state = torch.get_rng_state()
    whole = torch.stack([fetch_all(images, epoch)[0] for epoch in range(3)])
    assert torch.equal(torch.get_rng_state(), state)
    keys: list[Key] = [(epoch, index) for epoch in range(3) for index in range(60)]
    keys = [keys[position] for position in torch.randperm(len(keys))] + keys[:5]
    for first in range(0, len(keys), 7):
        part = keys[first : first + 7]
        expected = torch.stack([whole[key] for key in part])
        assert torch.equal(images.__getitems__(part)[0], expected)
    same = TensorImages(images.samples, images.labels, 0, 3, True)
    assert torch.equal(fetch_all(same, 2)[0], whole[2])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_change_does_not_depend_on_ranks_or_workers(world_size: int, workers: int) -> None:
    images = _images(2, True)
    whole = fetch_all(images, epoch=4)[0]
    seen = 0
    for rank in range(world_size):
        share = TrainingShare(len(images), 4, rank, world_size, seed=1)
        share.set_position(4, start=12)
        with loading(images, share, workers) as loader:
            for samples, labels in loader:
                assert torch.equal(samples, whole[labels])
                seen += len(labels)
    assert seen == len(images) - 12


def _hows(seed: int, epoch: int) -> list[Any]:
    """Return how each of equal images is changed."""
    samples = torch.arange(1, 50, dtype=torch.uint8).view(1, 1, 7, 7).expand(40, -1, -1, -1)
    images = TensorImages(samples, torch.zeros(40).long(), seed, 2, True)
    return fetch_all(images, epoch)[0].tolist()


def test_changes_of_seeds_and_epochs_have_nothing_in_common() -> None:
    streams = [_hows(seed, epoch) for seed in range(4) for epoch in range(4)]
    for number, stream in enumerate(streams):
        for other in streams[:number]:
            # Two that are independent agree in one of 50 images.
            assert sum(one == two for one, two in zip(stream, other, strict=True)) < 10


def test_an_image_smaller_than_its_padding_is_cropped() -> None:
    images = _images(4, False, shape=(2000, 1, 2, 1))
    changed, _ = fetch_all(images)
    seen = [image.flatten() > 0 for image in changed]
    assert {tuple(each.tolist()) for each in seen} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


def test_seeds_of_any_size_change_images() -> None:
    changed = [fetch_all(_images(2, True, seed))[0] for seed in (1, 2**63, 2**64 + 5)]
    assert all(not torch.equal(changed[0], other) for other in changed[1:])


def test_changing_images_leaves_the_stored_ones_alone() -> None:
    images = _images(0, True)
    stored = images.samples.clone()
    assert not torch.equal(fetch_all(images)[0], stored)
    assert torch.equal(images.samples, stored)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((4, 8, 8), torch.zeros(4).long()),
        ((4, 1, 8, 8), torch.zeros(3).long()),
        ((4, 1, 8, 8), torch.zeros(4, 1).long()),
        ((4, 1, 8, 8), torch.zeros(4)),
        ((4, 1, 8, 8), torch.zeros(4).int()),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    shape: tuple[int, ...], labels: Tensor
) -> None:
    with pytest.raises(ConfigError, match=r"must be samples of shape \(N, C, H, W\).* received"):
        TensorImages(torch.zeros(shape), labels)


def test_none_of_the_images_can_be_asked_for() -> None:
    images, labels = _images(2, True).__getitems__([])
    assert (images.shape, images.dtype) == ((0, 2, 5, 7), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)


# MNIST's format.


def _idx(array: Bytes) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def _write_mnist(directory: Path, train: int = 30, test: int = 10) -> dict[str, Bytes]:
    directory.mkdir(exist_ok=True)
    arrays: dict[str, Bytes] = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = random_bytes(count, 6, 5)
        arrays[f"{part}-labels-idx1-ubyte"] = random_bytes(count) % 10
    for name, array in arrays.items():
        (directory / name).write_bytes(_idx(array))
    return arrays


def _mnist(path: Path, crop_padding: int = 0, flip: bool = False) -> MnistConfig:
    return MnistConfig(
        batch_size=4, workers=0, path=str(path), crop_padding=crop_padding, flip=flip
    )


def _keep(file: Path) -> None:
    pass


def _zip(file: Path) -> None:
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()


def _dot(file: Path) -> None:
    file.rename(file.with_name(file.name.replace("-idx", ".idx")))


@pytest.mark.parametrize("change", [_keep, _zip, _dot])
def test_mnist_is_read_under_every_name_it_goes_by(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    arrays = _write_mnist(tmp_path)
    for file in list(tmp_path.iterdir()):
        change(file)
    dataset = load_dataset(_mnist(tmp_path), seed=0)
    for part, samples in (("train", dataset.train), ("t10k", dataset.test)):
        images, labels = fetch_all(samples)
        assert np.array_equal(images.squeeze(1).numpy(), arrays[f"{part}-images-idx3-ubyte"])
        assert labels.tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.input.shape == (1, 6, 5)
    assert dataset.classes == tuple("0123456789")
    assert_standardized(dataset)


def test_only_training_images_are_changed_and_by_the_seed(tmp_path: Path) -> None:
    arrays = _write_mnist(tmp_path)
    one, other = (load_dataset(_mnist(tmp_path, 2, True), seed=seed) for seed in (0, 1))
    assert not torch.equal(fetch_all(one.train, 0)[0], fetch_all(one.train, 1)[0])
    assert not torch.equal(fetch_all(one.train)[0], fetch_all(other.train)[0])
    stored = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).unsqueeze(1)
    assert torch.equal(fetch_all(one.test, 0)[0], stored)
    assert torch.equal(fetch_all(one.test, 1)[0], stored)
    # What is measured is the data, and not what chance makes of it.
    assert one.preprocessing == load_dataset(_mnist(tmp_path), seed=0).preprocessing


def _damaged_gzip(content: bytes) -> bytes:
    return gzip.compress(content)[:10] + b"\xff" * 100


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("", lambda content: content[:-1]),
        ("", lambda content: content[:16]),
        ("", lambda content: content[:7]),
        ("", lambda content: b""),
        ("", lambda content: content + b"x"),
        ("", lambda content: b"\0\0\x08\x01" + content[4:]),  # one dimension
        ("", lambda content: b"\0\0\x0d\x03" + content[4:]),  # of float32
        ("", lambda content: b"\x89PNG" + content),
        ("", gzip.compress),  # not under a name that says so
        (".gz", lambda content: content),
        (".gz", lambda content: gzip.compress(content)[:-20]),
        (".gz", _damaged_gzip),
    ],
)  # fmt: skip
def test_damaged_or_foreign_file_is_named(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    _write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()
    file.unlink()
    file = file.with_name(file.name + suffix)
    file.write_bytes(damage(content))
    with pytest.raises(ConfigError, match=f"{file}.*get it again"):
        load_dataset(_mnist(tmp_path), seed=0)


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(random_bytes(9) % 10))
    with pytest.raises(ConfigError, match=r"has 10 images, but t10k-labels-idx1-ubyte 9 labels"):
        load_dataset(_mnist(tmp_path), seed=0)


@pytest.mark.parametrize("shape", [(0, 6, 5), (4, 0, 5)])
def test_images_without_pixels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(_idx(random_bytes(*shape)))
    with pytest.raises(ConfigError, match=r"data\.path=.*train-images-idx3-ubyte.*get it again"):
        load_dataset(_mnist(tmp_path), seed=0)


def test_test_images_must_be_of_the_training_images_size(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(_idx(random_bytes(10, 7, 5)))
    with pytest.raises(ConfigError, match=r"data\.path=.*: test.*\(2, 1, 7, 5\).*\(1, 6, 5\)"):
        load_dataset(_mnist(tmp_path), seed=0)


def test_labels_must_be_of_a_class(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.full(10, 25, np.uint8)))
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte.* 25"):
        load_dataset(_mnist(tmp_path), seed=0)


def test_missing_file_of_mnist_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match=rf"data.path={tmp_path}: .*t10k-labels.*cvdfoundation"):
        load_dataset(_mnist(tmp_path), seed=0)


def _fashion(path: Path) -> FashionMnistConfig:
    return FashionMnistConfig(batch_size=4, workers=0, path=str(path), crop_padding=0, flip=True)


def test_missing_fashion_mnist_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path=.*package dataset-fashion-mnist.*github"):
        load_dataset(_fashion(tmp_path / "nowhere"), seed=0)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_the_published_one() -> None:
    dataset = load_dataset(_fashion(DEBIAN), seed=0)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (60000, 10000)
    assert dataset.input.shape == (1, 28, 28)
    # As its authors and everybody since have them.
    assert dataset.preprocessing.mean == pytest.approx((0.2860,), abs=5e-5)
    assert dataset.preprocessing.std == pytest.approx((0.3530,), abs=5e-5)
    labels = dataset.train.__getitems__([(0, index) for index in range(60000)])[1]
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert dataset.classes == FASHION_CLASSES
    assert dataset.classes[int(labels[0])] == "Ankle boot"
