"""What is checked when a model of any task is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from service.metrics import Metrics
from service.models import model as model_module
from service.models.model import Compute, ServedModel, load_model
from syncbn.bundle import Architecture, read_bundle, write_bundle
from syncbn.errors import BundleError
from syncbn.models import build_model
from syncbn.transforms.fold import Folding, fold
from tests.support.describe import describe
from tests.support.networks import MASKED, MIXED
from tests.support.task_bundles import write_segmenter, write_vectors


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("tasks")
    write_segmenter(models / "segments")
    write_vectors(models / "vectors")
    return models


def _load(path: Path, **changes: Any) -> ServedModel:
    compute = Compute(
        device=torch.device("cpu"),
        dtype=torch.float32,
        compile=False,
        threads=1,
        max_batch_size=4,
        max_queue_rows=100,
        timeout_s=30,
        drift=True,
    )
    return load_model(path, "1", replace(compute, **changes), Metrics(), allow_imports=True)


@pytest.mark.parametrize("task", ["segmentation", "tensor"])
def test_answer_that_depends_on_its_batch_is_refused_for_any_task(
    tmp_path: Path, task: str
) -> None:
    write_segmenter(tmp_path / "mixed", factory=MIXED, task=task)
    with pytest.raises(BundleError, match="an answer depends on what else is in its batch"):
        # Room for one sample is no way around it.
        _load(tmp_path / "mixed", max_batch_bytes=1)


@pytest.mark.parametrize("name", ["segments", "vectors"])
def test_folding_that_changes_answers_is_refused_for_any_task(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(model: nn.Module) -> Folding:
        folding = fold(model)
        for module in folding.model.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.data += 0.5
        return folding

    assert not any(
        isinstance(each, nn.BatchNorm2d) for each in _load(tasks / name).predictor.model.modules()
    )
    monkeypatch.setattr(model_module, "fold", broken)
    with pytest.raises(BundleError, match="folding batch normalization changes the model's answer"):
        _load(tasks / name)


def test_model_with_a_mask_of_infinities_is_served_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"in_channels": 2, "num_classes": 3}
    description = describe(architecture=Architecture(name=MASKED, arguments=arguments))
    model = build_model(MASKED, arguments, allow_imports=True)
    write_bundle(tmp_path / "masked", description, model, allow_imports=True)
    served = _load(tmp_path / "masked")
    samples = torch.randn(3, 2, 8, 8)
    probabilities = served.predictor(samples.numpy())
    expected = read_bundle(tmp_path / "masked", allow_imports=True).probabilities(samples)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    assert (probabilities[:, 1] == 0).all()

    def broken(model: nn.Module) -> Folding:
        folding = fold(model)
        folding.model.get_parameter("linear.bias").data += 0.5
        return folding

    # An infinite logit does not make every other difference small.
    monkeypatch.setattr(model_module, "fold", broken)
    with pytest.raises(BundleError, match="folding batch normalization changes the model's answer"):
        _load(tmp_path / "masked")
