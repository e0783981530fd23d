import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.errors import ConfigError
from syncbn.train.data.checks import kind_of_targets
from syncbn.train.data.datasets import DATASETS, Dataset, digits, load_dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Batch, Key
from syncbn.train.schema import CustomDataConfig, DigitsConfig, SyntheticConfig, schemas
from tests.syncbn.train.data.test_images import assert_standardized, fetch_all

# What every data set promises.


def test_there_is_a_data_set_for_each_configuration() -> None:
    assert set(DATASETS) == set(schemas("data"))


def test_importing_the_data_sets_loads_no_library_that_only_some_need() -> None:
    heavy = ["sklearn", "torchvision", "PIL", "matplotlib"]
    found = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import sys, syncbn.train.data.datasets; print(*{found})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []


# Digits.


def test_digits_are_split_the_same_way_each_time() -> None:
    one, other = digits(), load_dataset(DigitsConfig(batch_size=1, workers=0), seed=5)
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert all(map(torch.equal, fetch_all(mine), fetch_all(theirs)))
    # A few digits are equal in all 64 pixels, so it is sizes that show nothing was counted twice.
    assert one.test is not None
    assert (len(one.train), len(one.test)) == (1437, 360)


def test_digits_keep_their_pixels_and_are_standardized() -> None:
    dataset = digits()
    images, labels = fetch_all(dataset.train, epoch=3)
    assert torch.equal(images, fetch_all(dataset.train, epoch=4)[0])
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min().item(), images.max().item()) == (0, 16)
    assert_standardized(dataset)


# Synthetic images.


def _synthetic(
    samples: int = 200, test_samples: int = 100, channels: int = 3, classes: int = 7
) -> SyntheticConfig:
    return SyntheticConfig(
        batch_size=4,
        workers=0,
        samples=samples,
        test_samples=test_samples,
        channels=channels,
        size=8,
        classes=classes,
    )


def test_synthetic_images_are_the_same_for_every_seed_and_can_be_told_apart() -> None:
    one, other = (load_dataset(_synthetic(), seed=seed) for seed in (0, 1))
    images, labels = fetch_all(one.train)
    assert torch.equal(images, fetch_all(other.train)[0])
    assert (images.shape, images.dtype) == ((200, 3, 8, 8), torch.uint8)
    assert set(torch.bincount(labels).tolist()) <= {28, 29}
    means = torch.stack([images[labels == each].double().mean(0) for each in range(7)])
    test_images, test_labels = fetch_all(one.test)
    nearest = torch.cdist(test_images.double().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test_labels).double().mean() > 0.95
    # No sample's class can be read from one pixel, or there would be nothing to learn.
    one_pixel = (test_images.double() - means[:, None]).abs().argmin(0)
    assert (one_pixel == test_labels.view(-1, 1, 1, 1)).double().mean() < 0.3
    assert_standardized(one)


@pytest.mark.parametrize(("samples", "channels", "classes"), [(1, 1, 5), (3, 4, 2)])
def test_synthetic_images_come_in_any_shape(samples: int, channels: int, classes: int) -> None:
    config = _synthetic(samples=samples, channels=channels, classes=classes, test_samples=2)
    dataset = load_dataset(config, seed=0)
    assert fetch_all(dataset.train)[0].shape == (samples, channels, 8, 8)
    assert len(fetch_all(dataset.test)[1]) == 2
    assert len(dataset.classes) == classes


# The user's own.


FACTORIES = """
from syncbn.train.data.datasets import digits
number = 3
def good(**arguments):
    assert arguments == {"size": 4}
    return digits()
def bad(**arguments):
    raise KeyError("no such thing")
def other(**arguments):
    return [1, 2]
"""


def _custom(factory: str) -> CustomDataConfig:
    return CustomDataConfig(batch_size=1, workers=0, factory=factory, arguments={"size": 4})


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    (tmp_path / "my_broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)


@pytest.mark.usefixtures("factories")
def test_factory_is_called_with_its_arguments() -> None:
    assert len(load_dataset(_custom("my_factories:good"), seed=0).train) == 1437


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("no_such_module:good", "cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ("my_broken_module:good", "cannot be imported: ZeroDivisionError"),
        ("my_factories:absent", "cannot be imported: AttributeError"),
        ("my_factories:number", "is a int; it must be a function"),
        ("my_factories:bad", r"failed with data.arguments=\{'size': 4\}: KeyError: 'no such"),
        ("my_factories:other", "returned a list; it must return a syncbn.train.data.Dataset"),
    ],
)  # fmt: skip
def test_factory_that_gives_no_data_set_is_explained(factory: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.factory={factory} {problem}"):
        load_dataset(_custom(factory), seed=0)


# Whether the parts fit each other.


class Samples:
    """Three samples that are as somebody else's code has them."""

    def __init__(self, samples: Tensor, labels: Tensor, empty: Any = None) -> None:
        self.samples = samples
        self.labels = labels
        self.empty = empty

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Key]) -> Batch:
        if not keys and self.empty is not None:
            return self.empty()
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        return self.samples[indices], self.labels[indices]


def _made(**changes: Any) -> Dataset:
    samples = Samples(torch.zeros(3, 2, 4), torch.tensor([0, 1, 1]))
    dataset = Dataset(
        train=samples,
        test=samples,
        classes=("no", "yes"),
        input=InputSpec(name="signal", shape=(2, 4), dtype="float32"),
        preprocessing=Preprocessing(scale=1, mean=(0, 0), std=(1, 1)),
    )
    return dataclasses.replace(dataset, **changes)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Dataset], Dataset]:
    def load(dataset: Dataset, **options: Any) -> Dataset:
        module = ModuleType("my_data")
        vars(module)["make"] = lambda **_: dataset  # pyright: ignore[reportUnknownLambdaType] -- takes whatever it is given
        monkeypatch.setitem(sys.modules, "my_data", module)
        return load_dataset(_custom("my_data:make"), seed=0, **options)

    return load


def _no_stack() -> Batch:
    return torch.stack([]), torch.tensor([])


LABELS = torch.tensor([0, 1, 1])
FIT = torch.zeros(3, 2, 4)


def test_a_data_set_need_not_be_of_images(load: Callable[[Dataset], Dataset]) -> None:
    dataset = _made()
    assert load(dataset) is dataset


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preprocessing": Preprocessing(scale=1, mean=(0,), std=(1, 1))},
         r"preprocessing has 1 means and 2 deviations; input\.shape=\(2, 4\) needs 2 of each"),
        ({"classes": ()}, r"classes is \(\); it must be a tuple of names"),
        ({"classes": ["no", "yes"]}, r"classes is \['no', 'yes'\]; it must be a tuple of names"),
        ({"classes": (0, 1)}, r"classes is \(0, 1\); it must be a tuple of names"),
        ({"classes": ("yes", "no", "yes", "no", "so")}, "'yes', 'no' stands more than once in cl"),
        ({"classes": ("no", "\udce9")}, r"the class name '\\udce9' is not Unicode"),
        ({"palette": ((0, 0, 0),)}, "palette must have three numbers .* each of the 2 classes"),
        ({"palette": ((0, 0, 0), (0, 0, 256))}, "palette must have three numbers from 0 to 255"),
        ({"validation": Samples(FIT[:0], LABELS[:0])}, "validation has no samples; it needs at"),
        ({"validation": Samples(FIT, LABELS + 1)}, "validation has the label 2, but there are 2"),
        ({"train": Samples(FIT[:0], LABELS[:0])}, "train has no samples; it needs at least one"),
        ({"test": Samples(FIT[:0], LABELS[:0])}, "test has no samples; it needs at least one"),
        ({"train": Samples(torch.zeros(3, 3, 4), LABELS)},
         r"train.*\(2, 3, 4\).*must return samples of shape \(2, 2, 4\)"),
        ({"test": Samples(torch.zeros(3, 2, 5), LABELS)}, r"test.*\(2, 2, 5\).*\(2, 2, 4\)"),
        ({"train": Samples(FIT, LABELS.int())}, r"train.*torch\.int32.*dtype torch\.int64"),
        ({"train": Samples(FIT, LABELS[:, None])}, r"train.*labels of shape \(2,\)"),
        ({"train": Samples(FIT, LABELS[:2])},
         r"train.__getitems__\(\[\(0, 0\), \(0, 2\)\]\) failed: IndexError"),
        ({"train": Samples(FIT, LABELS, _no_stack)},
         r"train.__getitems__\(\[\]\) failed: RuntimeError.*for any number of keys, also none"),
        ({"train": Samples(FIT, LABELS, lambda: 3)},
         r"train.__getitems__\(\[\]\) failed: TypeError"),
        ({"train": Samples(FIT, LABELS, lambda: (FIT[:0],) * 3)}, r"train.* and .* and .*must"),
        ({"test": Samples(FIT, LABELS + 1)}, "test has the label 2, but there are 2 classes; .*1$"),
        ({"test": Samples(FIT, LABELS - 1)}, "test has the label -1, but there are 2 classes"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_said_before_training(
    load: Callable[[Dataset], Dataset], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"^data.factory=my_data:make: {problem}"):
        load(_made(**changes))


def test_all_labels_in_memory_are_looked_at(load: Callable[[Dataset], Dataset]) -> None:
    labels = torch.tensor([0, 7, 1])
    dataset = _made(
        train=TensorImages(torch.zeros(3, 2, 4, 4), labels),
        test=TensorImages(torch.zeros(3, 2, 4, 4), labels % 2),
        input=InputSpec(name="image", shape=(2, 4, 4), dtype="float32"),
    )
    with pytest.raises(ConfigError, match="train has the label 7, but there are 2 classes"):
        load(dataset)


# Targets of other kinds.

MASKS = torch.tensor([0, 1, 255, 1])[torch.arange(48) % 4].view(3, 4, 4)


def _of_masks(masks: Tensor, **changes: Any) -> Dataset:
    samples = Samples(torch.zeros(3, 2, 4, 4), masks)
    shape = InputSpec(name="image", shape=(2, 4, 4), dtype="float32")
    return _made(train=samples, test=samples, input=shape, **changes)


def test_targets_may_be_masks_in_which_255_counts_for_nothing(
    load: Callable[[Dataset], Dataset],
) -> None:
    assert kind_of_targets(load(_of_masks(MASKS))) == "masks"
    with pytest.raises(ConfigError, match=r"train has the pixel value 3, .* 0 to 1, or 255 if"):
        load(_of_masks(MASKS + (MASKS == 0) * 3))


def test_all_splits_have_one_kind_of_targets(load: Callable[[Dataset], Dataset]) -> None:
    labels = Samples(torch.zeros(3, 2, 4, 4), LABELS)
    with pytest.raises(ConfigError, match="train has masks, test has labels; all splits must"):
        load(dataclasses.replace(_of_masks(MASKS), test=labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_targets_of_other_kinds_are_for_tasks_that_take_them(
    load: Callable[..., Dataset], dtype: torch.dtype
) -> None:
    samples = Samples(FIT, torch.zeros(3, 5, dtype=dtype))
    dataset = _made(train=samples, test=samples, classes=())
    assert kind_of_targets(load(dataset, any_targets=True)) == "other"
    with pytest.raises(ConfigError, match="classes"):
        load(dataset)
    with pytest.raises(ConfigError, match=r"of shape \(2, 5\); .* labels of shape \(2,\)"):
        load(dataclasses.replace(dataset, classes=("a", "b")))
    short = Samples(FIT, torch.zeros(3, 5), lambda: (FIT[:0], torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"targets whose first axis has the length 0"):
        load(dataclasses.replace(dataset, test=short), any_targets=True)


# What a user's function draws at random.

DRAWING = """
import random
import numpy, torch
drawn = []
def make(**_):
    from syncbn.train.data.datasets import digits
    drawn.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
    return digits()
"""


def test_generators_are_seeded_by_the_job_before_a_users_function_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_drawing.py").write_text(DRAWING)
    monkeypatch.syspath_prepend(tmp_path)
    for seed in (3, 3, 4, 2**63 - 1):
        load_dataset(_custom("my_drawing:make"), seed=seed)
    drawn = sys.modules.pop("my_drawing").drawn
    assert drawn[0] == drawn[1]
    assert len({each for draw in drawn for each in draw}) == 9
