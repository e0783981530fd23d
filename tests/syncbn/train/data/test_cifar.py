import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from syncbn.errors import ConfigError
from syncbn.train.data.datasets import load_dataset
from syncbn.train.schema import CifarConfig
from tests.syncbn.train.data.test_images import (
    Bytes,
    assert_standardized,
    fetch_all,
    random_bytes,
)


def _write_cifar(root: Path) -> tuple[Bytes, list[int]]:
    """Write a CIFAR-10 of 3 images a file; return the training images and labels."""
    directory = root / "cifar-10-batches-py"
    directory.mkdir(parents=True)
    pixels, labels = random_bytes(15, 3, 32, 32), [number % 10 for number in range(15)]
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for number, name in enumerate(names):
        part = slice(3 * number, 3 * number + 3)
        content = {"data": pixels[part].reshape(3, -1), "labels": labels[part]}
        (directory / name).write_bytes(pickle.dumps(content))
    content = {"data": random_bytes(3, 3072), "labels": [7, 8, 9]}
    (directory / "test_batch").write_bytes(pickle.dumps(content))
    classes = [f"class {number}" for number in range(10)]
    (directory / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return pixels, labels


def _trust_cifar(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files there the ones that were published."""
    from torchvision.datasets import CIFAR10

    def entry(name: str) -> list[str]:
        # Not for security: it is what torchvision compares.
        return [name, hashlib.md5((directory / name).read_bytes()).hexdigest()]

    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [entry(name) for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [entry("test_batch")])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": entry("batches.meta")[1]})


def _cifar(path: Path) -> CifarConfig:
    return CifarConfig(batch_size=4, workers=0, path=str(path), crop_padding=0, flip=False)


@pytest.mark.parametrize("part", ["", "cifar-10-batches-py"])
def test_cifar10_is_read_by_its_directory_or_the_one_above(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = _write_cifar(tmp_path)
    _trust_cifar(tmp_path / "cifar-10-batches-py", monkeypatch)
    dataset = load_dataset(_cifar(tmp_path / part), seed=0)
    images, found = fetch_all(dataset.train)
    assert np.array_equal(images.numpy(), pixels)
    assert found.tolist() == labels
    assert fetch_all(dataset.test)[1].tolist() == [7, 8, 9]
    assert dataset.input.shape == (3, 32, 32)
    assert dataset.classes == tuple(f"class {number}" for number in range(10))
    assert_standardized(dataset)


class _Evil:
    """What does something when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_changed_file_of_cifar10_is_refused_before_it_is_unpickled(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_cifar(tmp_path)
    directory, proof = tmp_path / "cifar-10-batches-py", tmp_path / "proof"
    _trust_cifar(directory, monkeypatch)
    (directory / name).write_bytes(pickle.dumps(_Evil(proof)))
    with pytest.raises(ConfigError, match=r"data.path=.*no intact CIFAR-10"):
        load_dataset(_cifar(directory), seed=0)
    assert not proof.exists()


def test_missing_cifar10_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path=.*nowhere: .*data_batch_1.*https://www.cs"):
        load_dataset(_cifar(tmp_path / "nowhere"), seed=0)
