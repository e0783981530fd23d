import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn.bundle import (
    Architecture,
    Description,
    InputSpec,
    Preprocessing,
    check_exportable,
    read_bundle,
    write_bundle,
)
from syncbn.errors import BundleError
from syncbn.models import build_model
from tests.support.describe import ARGUMENTS, describe
from tests.support.networks import MASKED, SEGMENTER, VECTORS

SMALL = {"in_channels": 2, "num_classes": 3}


def _described(factory: str, **changes: Any) -> tuple[Description, nn.Module]:
    description = describe(architecture=Architecture(name=factory, arguments=SMALL), **changes)
    return description, build_model(factory, SMALL, allow_imports=True).eval()


def test_segmentation_is_read_back_with_probabilities_of_each_pixel(tmp_path: Path) -> None:
    palette = ((0, 0, 0), (230, 159, 0), (86, 180, 233))
    description, model = _described(SEGMENTER, task="segmentation", palette=palette)
    write_bundle(tmp_path / "bundle", description, model, allow_imports=True)
    read = read_bundle(tmp_path / "bundle", allow_imports=True)
    assert read.manifest.task == "segmentation"
    assert read.manifest.palette == palette
    x = torch.randn(5, 2, 8, 8)
    logits = model(description.preprocessing.apply(x))
    torch.testing.assert_close(read.outputs(x), logits)
    torch.testing.assert_close(read.probabilities(x), logits.softmax(1))
    assert read.probabilities(x).shape == (5, 3, 8, 8)


def test_tensor_is_given_out_as_it_is_and_has_no_probabilities(tmp_path: Path) -> None:
    description, model = _described(VECTORS, task="tensor", classes=())
    write_bundle(tmp_path / "bundle", description, model, allow_imports=True)
    read = read_bundle(tmp_path / "bundle", allow_imports=True)
    x = torch.randn(5, 2, 8, 8)
    torch.testing.assert_close(read.outputs(x), model(description.preprocessing.apply(x)))
    with pytest.raises(BundleError, match=r"'small' answers tensors, .*; use outputs\(\)"):
        read.probabilities(x)


@pytest.mark.parametrize(
    ("factory", "task", "message"),
    [
        (SEGMENTER, "classification", r"into shape \(1, 3, 8, 8\), not into one logit for each"),
        (VECTORS, "segmentation", r"into shape \(1, 3\), not into \(1, 3, 8, 8\): one logit for"),
    ],
)
def test_output_of_another_task_is_refused(factory: str, task: str, message: str) -> None:
    description, model = _described(factory, task=task)
    with pytest.raises(BundleError, match=message):
        check_exportable(description, model, allow_imports=True)


def test_buffer_may_be_infinite_but_is_a_number(tmp_path: Path) -> None:
    description, model = _described(MASKED)
    check_exportable(description, model, allow_imports=True)
    write_bundle(tmp_path / "bundle", description, model, allow_imports=True)
    read = read_bundle(tmp_path / "bundle", allow_imports=True)
    assert read.model.state_dict()["mask"].isinf().tolist() == [False, True, False]
    model.get_buffer("mask")[0] = torch.nan
    for refuse in (
        lambda: check_exportable(description, model, allow_imports=True),
        lambda: write_bundle(tmp_path / "other", description, model, allow_imports=True),
    ):
        with pytest.raises(BundleError, match="buffer 'mask' holds values that are not numbers"):
            refuse()


@pytest.mark.parametrize("key", ["0.weight", "1.running_mean", "1.running_var"])
def test_infinite_parameters_and_statistics_are_refused_in_writing_alone(
    tmp_path: Path, key: str
) -> None:
    model = build_model("cnn", ARGUMENTS)
    model.state_dict()[key].fill_(torch.inf)
    check_exportable(describe(), model)  # training may change them yet
    with pytest.raises(BundleError, match=f"tensor '{key}' holds values that are not finite"):
        write_bundle(tmp_path / "bundle", describe(), model)


class _Named(nn.Module):
    """Gives its state dict another key, or another kind of tensor."""

    def __init__(self, key: str, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {self.key: self.value}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Named("a", torch.eye(2).to_sparse()), "tensor 'a' has the layout torch.sparse_coo"),
        (_Named("a\udcff", torch.ones(2)), r"tensor 'a\\udcff' of torch.float32 cannot be stored"),
        (build_model("cnn", ARGUMENTS | {"width": 8}), "tensor '0.weight' should be"),
        (nn.Linear(1, 1), "misses tensors"),
    ],
)
def test_model_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, model: nn.Module, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        check_exportable(describe(), model)
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", describe(), model)
    assert list(tmp_path.iterdir()) == []


def test_import_path_is_refused_before_training_unless_allowed() -> None:
    description, model = _described(SEGMENTER, task="segmentation")
    with pytest.raises(BundleError, match="is an import path, which is refused"):
        check_exportable(description, model)
    check_exportable(description, model, allow_imports=True)


def test_check_of_a_large_model_takes_less_than_a_second() -> None:
    name, arguments = "torchvision.resnet50", {"in_channels": 3, "num_classes": 1000}
    model = build_model(name, arguments)
    description = describe(
        architecture=Architecture(name=name, arguments=arguments),
        input=InputSpec(name="image", shape=(3, 224, 224), dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3),
        classes=tuple(map(str, range(1000))),
    )
    start_s = time.process_time()
    check_exportable(description, model)
    assert time.process_time() - start_s < 1.0
