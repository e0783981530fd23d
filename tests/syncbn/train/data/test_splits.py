from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.config import compose_config, config_dir, from_yaml, to_yaml
from syncbn.train.data.datasets import Dataset, load_dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Key, Samples
from syncbn.train.data.splits import Part, hold_out
from syncbn.train.schema import DigitsConfig, FolderConfig, SyntheticConfig, schemas
from tests.syncbn.train.data.test_images import fetch_all, random_bytes
from tests.syncbn.train.data.test_sampling import Numbered


def _indices(part: Samples | None) -> list[int]:
    assert isinstance(part, Part)
    return part.indices.tolist()


def _labeled(labels: list[int]) -> TensorImages:
    return TensorImages(torch.arange(len(labels)).view(-1, 1, 1, 1), torch.tensor(labels))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("labels", [None, [0] * 40 + [1] * 7 + [3] * 2 + [4]])
def test_the_parts_are_the_whole_and_share_no_sample(
    share: float, labels: list[int] | None
) -> None:
    samples: Samples = Numbered(50) if labels is None else _labeled(labels)
    train, validation = hold_out(samples, share, seed=3)
    assert sorted(_indices(train) + _indices(validation)) == list(range(50))
    assert abs(len(_indices(validation)) - 50 * share) <= (0.5 if share < 0.9 else 3)


def test_each_class_gives_its_share_to_one_sample() -> None:
    counts = {0: 100, 1: 55, 2: 14, 5: 3, 9: 1}
    labels = [label for label, count in counts.items() for _ in range(count)]
    _, validation = hold_out(_labeled(labels), 0.1, seed=0)
    taken = Counter(labels[index] for index in _indices(validation))
    assert sum(taken.values()) == round(0.1 * len(labels))
    for label, count in counts.items():
        assert abs(taken[label] - count * 0.1) < 1
    assert taken[9] == 0  # or training would not have the class


def test_classes_of_one_sample_are_drawn_by_chance() -> None:
    train, validation = hold_out(_labeled(list(range(10))), 0.3, seed=0)
    assert (len(train), len(_indices(validation))) == (7, 3)


def test_the_share_depends_on_seed_and_sizes_alone() -> None:
    samples = _labeled([0, 1] * 50)
    state = torch.get_rng_state()
    drawn = [_indices(hold_out(samples, 0.2, seed)[1]) for seed in (0, 1, 2**63 - 1, 0)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[3]
    assert len({tuple(each) for each in drawn}) == 3


def test_without_a_share_the_samples_are_what_they_were() -> None:
    samples = _labeled([0, 1])
    assert hold_out(samples, 0.0, seed=0) == (samples, None)


def test_of_few_samples_one_validates_at_least_and_one_is_left() -> None:
    assert len(_indices(hold_out(_labeled([0, 0]), 0.01, seed=0)[1])) == 1
    with pytest.raises(ConfigError, match=r"data.validation=0.1 of 1 .* or data.validation=0 for"):
        hold_out(_labeled([0]), 0.1, seed=0)
    with pytest.raises(ConfigError, match=r"data.validation=0.9 of 4 training samples leaves none"):
        hold_out(_labeled([0, 0, 1, 1]), 0.9, seed=0)


def test_parts_look_as_in_the_whole_and_only_training_is_changed_at_random() -> None:
    images = TensorImages(
        torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8), torch.arange(40) % 4, 7, 2, True
    )
    train, validation = hold_out(images, 0.25, seed=1)
    assert isinstance(train, Part)
    assert isinstance(validation, Part)
    for epoch in (0, 5):
        changed, labels = fetch_all(images, epoch)
        found, found_labels = fetch_all(train, epoch)
        assert torch.equal(found, changed[train.indices])
        assert torch.equal(found_labels, labels[train.indices])
        assert torch.equal(fetch_all(validation, epoch)[0], images.samples[validation.indices])
    assert torch.equal(train.plain().samples.__getitems__([(0, 3)])[0][0], images.samples[3])
    assert torch.equal(train.labels if train.labels is not None else Tensor(), found_labels)


class _Plain(Numbered):
    def plain(self) -> Samples:
        return Numbered(1000 + self.size)


@pytest.mark.parametrize(("samples", "whole"), [(Numbered(20), 20), (_Plain(20), 1020)])
def test_samples_without_random_changes_are_asked_for_if_they_are_offered(
    samples: Numbered, whole: int
) -> None:
    _, validation = hold_out(samples, 0.1, seed=0)
    assert isinstance(validation, Part)
    assert len(validation.samples) == whole


# What data sets make of it.


def _digits(validation: float) -> Dataset:
    config = DigitsConfig(batch_size=1, workers=0, validation=validation)
    return load_dataset(config, seed=0)


def test_a_tenth_of_the_training_digits_validates_and_does_not_standardize() -> None:
    whole, split = _digits(0.0), _digits(0.1)
    assert (len(split.train), len(split.validation or []), len(split.test or [])) == (
        1293,
        144,
        360,
    )
    assert whole.validation is None
    images = fetch_all(split.train)[0]
    inputs = split.preprocessing.apply(images)
    assert abs(inputs.mean().item()) < 1e-6
    assert split.preprocessing != whole.preprocessing


def test_the_share_of_images_in_bytes_does_not_standardize_either() -> None:
    config = SyntheticConfig(
        batch_size=1,
        workers=0,
        validation=0.5,
        samples=8,
        test_samples=1,
        channels=2,
        size=4,
        classes=2,
    )
    dataset = load_dataset(config, seed=0)
    inputs = dataset.preprocessing.apply(fetch_all(dataset.train)[0])
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-6


def _save(file: Path) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_bytes(9, 8, 3)).save(file)


def _folder(path: Path, *splits: str, validation: float = 0.25) -> Dataset:
    for split in splits:
        for name in ("cat", "dog"):
            for number in range(4 if split == "train" else 1):
                _save(path / split / name / f"{number}.png")
    config: dict[str, Any] = {"size": 8, "flip": True, "crop_scale_min": 0.2, "workers": 0}
    return load_dataset(
        FolderConfig(batch_size=1, path=str(path), validation=validation, **config), seed=0
    )


@pytest.mark.parametrize("validation", [0.0, 0.25])
@pytest.mark.parametrize("splits", [("val", "test"), ("val",), ("test",)])
def test_val_validates_and_test_tests(
    tmp_path: Path, splits: tuple[str, ...], validation: float
) -> None:
    dataset = _folder(tmp_path, "train", *splits, validation=validation)
    sizes = [len(each or []) for each in (dataset.train, dataset.validation, dataset.test)]
    taken = 2 if validation and "val" not in splits else 0
    assert sizes == [8 - taken, 2 if "val" in splits else taken, 2 if "test" in splits else 0]


def test_validating_images_of_a_folder_are_not_changed_at_random(tmp_path: Path) -> None:
    dataset = _folder(tmp_path, "train", "test")
    assert dataset.validation is not None
    first, labels = fetch_all(dataset.validation, epoch=0)
    assert torch.equal(first, fetch_all(dataset.validation, epoch=1)[0])
    assert labels.tolist() == [0, 1]
    assert not torch.equal(fetch_all(dataset.train, 0)[0], fetch_all(dataset.train, 1)[0])


def test_a_share_keeps_the_labels_by_which_ranks_share(tmp_path: Path) -> None:
    keys: list[Key] = [(0, index) for index in range(6)]
    train = _folder(tmp_path, "train", "test").train
    assert isinstance(train, Part)
    assert train.labels is not None
    assert torch.equal(train.labels, train.__getitems__(keys)[1])


def test_configurations_of_older_runs_have_no_validation_share() -> None:
    new = ("validation", "drop_last", "balanced", "skip_damaged")
    text = to_yaml(compose_config(["data=folder", "data.path=x"]))
    lines = [line for line in text.splitlines() if line.strip().partition(":")[0] not in new]
    assert len(text.splitlines()) - len(lines) == len(new)
    data = from_yaml("\n".join(lines)).data
    assert isinstance(data, FolderConfig)
    assert (data.validation, data.drop_last, data.balanced, data.skip_damaged) == (0, 0, 0, 0)


def test_a_tenth_validates_by_default_in_every_data_set() -> None:
    for name in schemas("data"):
        with (config_dir() / "data" / f"{name}.yaml").open() as file:
            assert "\nvalidation: 0.1\n" in file.read()
