import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from service.metrics import Metrics
from service.models import model as model_module
from service.models.model import Compute, Predictor, ServedModel, load_model
from syncbn.bundle import (
    Architecture,
    Bundle,
    Description,
    InputSpec,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from syncbn.errors import BundleError
from syncbn.transforms.fold import Folding, fold
from tests.service.conftest import write_small_bundle

COMPUTE = Compute(
    device=torch.device("cpu"),
    dtype=torch.float32,
    compile=False,
    threads=2,
    max_batch_size=8,
    max_queue_rows=100,
    timeout_s=30,
    drift=True,
)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _load(path: Path, **changes: Any) -> ServedModel:
    compute = replace(COMPUTE, **changes)
    return load_model(path, "1", compute, Metrics(), allow_imports=True)


def batch_dependent(in_channels: int, num_classes: int) -> nn.Module:
    """What each sample gets depends on the others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(0))

    return Model()


def without_statistics(in_channels: int, num_classes: int) -> nn.Module:
    """What has no running statistics."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.BatchNorm1d(1, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def overflowing(in_channels: int, num_classes: int) -> nn.Module:
    """What answers nothing but NaN."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * float("nan")

    return Model()


def _write_own(path: Path, factory: Callable[[int, int], nn.Module]) -> Path:
    """Write the bundle of a model of this module, for inputs of 4 values."""
    arguments: dict[str, int | float | bool | str] = {"in_channels": 4, "num_classes": 3}
    description = Description(
        name="own",
        architecture=Architecture(name=f"{__name__}:{factory.__name__}", arguments=arguments),
        input=InputSpec(name="x", shape=(4,), dtype="float32"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0,) * 4, std=(1.0,) * 4),
        classes=("a", "b", "c"),
        metrics={},
        config_sha256="0" * 64,
    )
    torch.manual_seed(0)
    write_bundle(path, description, factory(4, 3), allow_imports=True)
    return path


def _samples(bundle: Bundle, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, *bundle.manifest.input.shape, generator=generator)


def test_answers_are_those_of_the_model_in_evaluation_in_float64(models: Path) -> None:
    bundle = read_bundle(models / "one")
    samples = _samples(bundle, 50)
    exact = bundle.model.double()
    with torch.no_grad():
        mean, std, scale = 0.25, 2.0, 0.5
        expected = exact((samples.double() * scale - mean) / std).softmax(1).numpy()
        reference = read_bundle(models / "one").probabilities(samples).numpy()
    served = Predictor(read_bundle(models / "one"), COMPUTE)(samples.numpy())
    assert served.dtype == np.float32
    # Folding may not cost more than a few of the reference's own roundings.
    allowed = 4 * np.abs(reference - expected).max() + np.finfo(np.float32).eps
    assert np.abs(served - expected).max() <= allowed


@pytest.mark.parametrize("threads", [1, 2])
def test_sample_gets_the_same_answer_alone_and_in_any_batch(models: Path, threads: int) -> None:
    bundle = read_bundle(models / "one")
    samples = _samples(bundle, 33).numpy()
    torch.set_num_threads(threads)
    predictor = Predictor(bundle, COMPUTE)
    together = predictor(samples)
    for size in (1, 2, 3, 8, 32):
        parts = [predictor(samples[at : at + size]) for at in range(0, 33, size)]
        np.testing.assert_allclose(np.concatenate(parts), together, rtol=0, atol=1e-5)


def test_bundle_is_left_as_it_was(models: Path) -> None:
    bundle = read_bundle(models / "one")
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    samples = _samples(bundle, 4)
    expected = bundle.probabilities(samples)
    Predictor(bundle, COMPUTE)
    for key, value in bundle.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(bundle.probabilities(samples), expected)


def test_batch_normalization_is_folded(models: Path) -> None:
    predictor = Predictor(read_bundle(models / "one"), COMPUTE)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in predictor.model.modules())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (without_statistics, "layer '1' has no running statistics, so that a sample's answer"),
        (batch_dependent, "an answer depends on what else is in its batch: the difference is"),
    ],
)
def test_model_whose_answers_depend_on_the_batch_is_refused(
    tmp_path: Path, factory: Callable[[int, int], nn.Module], message: str
) -> None:
    path = _write_own(tmp_path / "own", factory)
    with pytest.raises(BundleError, match=message):
        _load(path)


def test_model_that_overflows_is_loaded_and_its_answers_refused_later(tmp_path: Path) -> None:
    served = _load(_write_own(tmp_path / "own", overflowing))
    assert served.name == "own"


def test_folding_that_changes_the_answer_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fold_wrongly(model: nn.Module) -> Folding:
        folding = fold(model)
        with torch.no_grad():
            next(folding.model.parameters()).mul_(1.01)
        return folding

    monkeypatch.setattr(model_module, "fold", fold_wrongly)
    with pytest.raises(BundleError, match="folding batch normalization changes the model's answer"):
        _load(models / "one")


def test_bfloat16_is_near(models: Path) -> None:
    bundle = read_bundle(models / "one")
    samples = _samples(bundle, 8)
    served = Predictor(bundle, replace(COMPUTE, dtype=torch.bfloat16))
    probabilities = served(samples.numpy())
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, bundle.probabilities(samples), rtol=0, atol=0.05)
    assert _load(models / "one", dtype=torch.bfloat16).name == "shapes"


def test_bfloat16_that_is_not_near_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_BFLOAT16_TOLERANCE", 1e-9)
    with pytest.raises(BundleError, match=r"in torch\.bfloat16, the probabilities differ"):
        _load(models / "one", dtype=torch.bfloat16)


@pytest.mark.long
def test_compiled_model_answers_alike(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "one")
    bundle = read_bundle(tmp_path / "one")
    served = _load(tmp_path / "one", compile=True, max_batch_size=2, drift=False)
    samples = _samples(bundle, 2)
    np.testing.assert_allclose(
        served.predictor(samples.numpy()), bundle.probabilities(samples), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("inline", [True, False])
def test_requests_are_answered_until_it_is_drained(
    models: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(model_module, "_INLINE_S", 1e9 if inline else 0.0)

    async def run() -> None:
        served = await asyncio.to_thread(_load, models / "one")
        served.start()
        loop = asyncio.get_running_loop()
        samples = _samples(read_bundle(models / "one"), 3).numpy()
        served.users += 1
        draining = asyncio.create_task(served.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        answer = await served.batcher.predict(samples, loop.time() + 30)
        served.release()
        assert answer.shape == (3, 3)
        async with asyncio.timeout(30):
            await draining
        assert served.watch is not None
        assert served.watch.report().samples in (0, 3)

    asyncio.run(run())


def test_request_that_never_ends_is_not_waited_for(models: Path) -> None:
    async def run() -> None:
        served = await asyncio.to_thread(_load, models / "one", timeout_s=0.05)
        served.start()
        served.users += 1
        async with asyncio.timeout(30):
            await served.drain()

    asyncio.run(run())


@pytest.mark.parametrize("norm", ["whitening", "none"])
def test_other_normalizations_are_served_as_they_were_trained(tmp_path: Path, norm: str) -> None:
    write_small_bundle(tmp_path / "one", norm=norm)
    served = _load(tmp_path / "one")
    bundle = read_bundle(tmp_path / "one")
    x = torch.randn(5, 1, 4, 4)
    expected = bundle.model(bundle.manifest.preprocessing.apply(x))
    assert np.allclose(served.predictor(x.numpy()), expected.softmax(1).numpy(), atol=1e-5)
