import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.bundle import Preprocessing
from syncbn.train.data.datasets import Dataset, load_dataset
from syncbn.train.data.digest import digest
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Batch, Key
from syncbn.train.schema import DigitsConfig, FolderConfig
from tests.syncbn.train.data.test_images import random_bytes


def _digits(seed: int = 0, validation: float = 0.1) -> Dataset:
    config = DigitsConfig(batch_size=4, workers=0, validation=validation)
    return load_dataset(config, seed)


def test_the_same_data_have_the_same_digest() -> None:
    assert digest(_digits()) == digest(_digits())


def _relabeled(dataset: Dataset) -> Dataset:
    assert isinstance(dataset.test, TensorImages)
    labels = dataset.test.labels.clone()
    labels[1] = (labels[1] + 1) % 10  # no sample that is fetched
    return dataclasses.replace(dataset, test=TensorImages(dataset.test.samples, labels))


def _other_pixel(dataset: Dataset) -> Dataset:
    assert isinstance(dataset.test, TensorImages)
    samples = dataset.test.samples.clone()
    samples[-1, 0, 0, 0] += 1
    return dataclasses.replace(dataset, test=TensorImages(samples, dataset.test.labels))


def _other(dataset: Dataset) -> Dataset:
    other = Preprocessing(scale=1 / 16, mean=(0.5,), std=(1.0,))
    return dataclasses.replace(dataset, preprocessing=other)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: _digits(seed=1),
        lambda: _digits(validation=0.2),
        lambda: _digits(validation=0.0),
        lambda: _relabeled(_digits()),
        lambda: _other_pixel(_digits()),
        lambda: _other(_digits()),
        lambda: dataclasses.replace(_digits(), classes=tuple("012345678x")),
        lambda: dataclasses.replace(_digits(), test=None),
    ],
)
def test_other_data_have_another_digest(changed: Any) -> None:
    assert digest(changed()) != digest(_digits())


class _Drawing(TensorImages):
    """Samples that break the rule: they draw from the global generators."""

    def __getitems__(self, keys: list[Key]) -> Batch:
        noise = torch.rand(()) + random.random() + np.random.rand()
        images, labels = super().__getitems__(keys)
        return images + noise, labels


def test_the_generators_are_left_alone_and_decide_nothing() -> None:
    samples = _Drawing(torch.zeros(3, 1, 8, 8), torch.zeros(3).long())
    dataset = dataclasses.replace(_digits(), train=samples)
    first = digest(dataset)
    state = torch.get_rng_state()
    assert digest(dataset) == first
    assert torch.equal(torch.get_rng_state(), state)


def _write(path: Path) -> None:
    for split, count in (("train", 40), ("test", 1)):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random_bytes(4, 4, 3)).save(path / split / name / f"{number}.bmp")


def _folder(path: Path) -> Dataset:
    config = FolderConfig(
        batch_size=1,
        workers=0,
        path=str(path),
        size=4,
        flip=True,
        crop_scale_min=0.5,
        validation=0.1,
    )
    return load_dataset(config, seed=0)


def test_files_count_by_their_names_and_sizes_wherever_they_lie(tmp_path: Path) -> None:
    _write(tmp_path / "one")
    first = digest(_folder(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert digest(_folder(tmp_path / "two")) == first
    file = tmp_path / "two" / "train" / "cat" / "11.bmp"
    with file.open("ab") as more:
        more.write(b"x")
    longer = digest(_folder(tmp_path / "two"))
    assert longer != first
    file.rename(file.with_name("11a.bmp"))
    assert digest(_folder(tmp_path / "two")) not in (first, longer)


def test_file_names_of_any_bytes_have_a_digest(tmp_path: Path) -> None:
    _write(tmp_path)
    file = tmp_path / "train" / "cat" / "3.bmp"
    file.rename(os.fsdecode(os.fsencode(tmp_path) + b"/train/cat/\xff.bmp"))
    assert len(digest(_folder(tmp_path))) == 64
