import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from syncbn.bundle import (
    MANIFEST_LIMIT_BYTES,
    Architecture,
    Estimate,
    Evaluation,
    InputSpec,
    Preprocessing,
    check_exportable,
    read_bundle,
    write_bundle,
)
from syncbn.errors import BundleError
from syncbn.models import build_model
from tests.support.describe import ARGUMENTS, describe, edit_manifest
from tests.support.networks import MASKED

VERSION_1 = Path(__file__).parents[2] / "support" / "bundles" / "version_1"
EVALUATION = Evaluation(
    split="test",
    samples=360,
    statistics="as trained",
    metrics={"accuracy": Estimate(value=0.981, low=0.961, high=0.991)},
)


def test_bundle_of_version_1_is_read_with_the_numbers_of_its_time() -> None:
    bundle = read_bundle(VERSION_1)
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    assert bundle.manifest.format_version == 1
    assert bundle.manifest.task == "classification"
    assert bundle.manifest.evaluations == ()
    assert bundle.manifest.palette is None
    assert bundle.manifest.metrics == {"epoch": 3.0, "test_loss": 0.75, "test_accuracy": 0.625}
    torch.testing.assert_close(
        bundle.probabilities(torch.tensor(expected["samples"])),
        torch.tensor(expected["probabilities"]),
    )


def test_version_2_is_written_with_task_and_evaluations(tmp_path: Path) -> None:
    description = describe(evaluations=(EVALUATION,))
    write_bundle(tmp_path / "bundle", description, build_model("cnn", ARGUMENTS))
    written = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert written["format_version"] == 2
    assert written["task"] == "classification"
    assert written["evaluations"] == [
        {
            "split": "test",
            "samples": 360,
            "statistics": "as trained",
            "metrics": {"accuracy": {"value": 0.981, "low": 0.961, "high": 0.991}},
        }
    ]
    assert read_bundle(tmp_path / "bundle").manifest.evaluations == (EVALUATION,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format version 1 has no task, evaluations"),
        ({"task": None}, "format version 2 needs task"),
        ({"evaluations": None}, "format version 2 needs evaluations"),
        ({"task": "detection"}, "task: Input should be 'classification', 'segmentation' or"),
        ({"classes": ["a", "b", "a"]}, "several classes are called 'a'"),
        ({"palette": [[0, 0, 0]] * 3}, "a classification takes no palette"),
        ({"task": "tensor", "palette": [[0, 0, 0]] * 3}, "a tensor takes no palette"),
        ({"task": "segmentation", "palette": [[0, 0, 0]]}, "palette has 1 colors for 3 classes"),
        ({"task": "segmentation", "palette": [[0, 0, 256]] * 3}, "palette.0.2: Input should be"),
        ({"classes": []}, "classes are empty; a classification needs at least one"),
    ],
)
def test_manifest_that_breaks_a_rule_of_version_2_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bundle"
    write_bundle(path, describe(), build_model("cnn", ARGUMENTS))
    edit_manifest(path, **changes)
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


def test_segmentation_needs_images() -> None:
    with pytest.raises(ValidationError, match=r"has 1 axes; a segmentation needs \(channels, h"):
        describe(
            task="segmentation",
            input=InputSpec(name="x", shape=(2,), dtype="float32"),
            preprocessing=Preprocessing(scale=1.0, mean=(0.0, 0.0), std=(1.0, 1.0)),
        )


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.5, None, "needs both of low and high"), (0.9, 0.5, "low is 0.9, above high, 0.5")],
)
def test_interval_of_an_estimate_is_one(
    low: float | None, high: float | None, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Estimate(value=0.7, low=low, high=high)
    assert Estimate(value=0.7, low=None, high=None).low is None


@pytest.mark.parametrize("value", [-1, 1, 0, -(2**63), 2**63 - 1, 1.0, -1.0, 0.5, True, "1"])
def test_arguments_keep_their_type(tmp_path: Path, value: object) -> None:
    arguments = Architecture(name="any", arguments={"a": value, "b": [value]}).arguments  # pyright: ignore[reportArgumentType] -- each is one
    description = describe(architecture=Architecture(name="any", arguments=arguments))
    read = type(description).model_validate_json(description.model_dump_json())
    for got in (arguments, read.architecture.arguments):
        assert got == {"a": value, "b": [value]}
        assert type(got["a"]) is type(value)
        assert [type(each) for each in got["b"]] == [type(value)]  # pyright: ignore[reportGeneralTypeIssues] -- a list


def test_negative_integer_reaches_the_factory_as_one(tmp_path: Path) -> None:
    arguments = {"in_channels": 2, "num_classes": 3, "dim": -1}
    model = build_model(MASKED, arguments, allow_imports=True)
    description = describe(architecture=Architecture(name=MASKED, arguments=arguments))
    write_bundle(tmp_path / "bundle", description, model, allow_imports=True)
    read = read_bundle(tmp_path / "bundle", allow_imports=True)
    x = torch.randn(3, 2, 8, 8)
    # A float would be refused: mean() takes an integer for its dimension.
    torch.testing.assert_close(read.model(x), model.eval()(x))


def test_integer_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValidationError, match="an integer must fit in 64 bits, got 9223372036854"):
        Architecture(name="any", arguments={"a": 2**63})


def _linear(classes: int) -> tuple[dict[str, Any], torch.nn.Module]:
    """Return the changes of a description, and a model, for so many classes."""
    arguments = {"in_channels": 2, "num_classes": classes, "width": 1, "size": 1, "depth": 1}
    return (
        {"architecture": Architecture(name="mlp", arguments=arguments)},
        build_model("mlp", arguments),
    )


def test_60_000_class_names_are_read_back(tmp_path: Path) -> None:
    changes, model = _linear(60_000)
    classes = tuple(f"the class of number {at}" for at in range(60_000))
    path = tmp_path / "bundle"
    write_bundle(path, describe(classes=classes, **changes), model)
    assert (path / "bundle.json").stat().st_size > 1 << 20
    assert read_bundle(path).manifest.classes == classes


def test_manifest_that_no_reader_takes_is_refused_before_training_and_in_writing(
    tmp_path: Path,
) -> None:
    changes, model = _linear(3)
    description = describe(classes=("a", "b", "c" * MANIFEST_LIMIT_BYTES), **changes)
    message = "bundle.json would have .* bytes, and may have .*: 3 class names are too many or too"
    with pytest.raises(BundleError, match=message):
        check_exportable(description, model)
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", description, model)
    assert list(tmp_path.iterdir()) == []


def test_check_keeps_room_for_metrics(tmp_path: Path) -> None:
    changes, model = _linear(3)
    nearly = describe(classes=("a", "b", "c" * (MANIFEST_LIMIT_BYTES - 5000)), **changes)
    write_bundle(tmp_path / "bundle", nearly, model)
    with pytest.raises(BundleError, match=r"would have .* bytes, and may have"):
        check_exportable(nearly, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("a", "b", "\udcff")}, r"the name of class '\\udcff' is not UTF-8; rename"),
        ({"classes": ("a", "b", "b")}, "several classes are called 'b'"),
    ],
)
def test_texts_that_no_manifest_holds_are_refused_before_training_and_in_writing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = build_model("cnn", ARGUMENTS)
    with pytest.raises(BundleError, match=message):
        check_exportable(describe(**changes), model)
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", describe(**changes), model)
    assert list(tmp_path.iterdir()) == []
