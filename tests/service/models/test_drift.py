import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from torch import nn

from service.app import create_app
from service.models.drift import DriftReport, DriftWatch
from service.settings import Settings
from syncbn.bundle import (
    Architecture,
    Bundle,
    Description,
    InputSpec,
    Manifest,
    Preprocessing,
    Versions,
    Weights,
)

MEAN, STD, SCALE = (0.25, -0.5), (2.0, 0.5), 0.5


class Clock:
    """A clock that stands still unless it is told not to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def _bundle(model: nn.Module) -> Bundle:
    description = Description(
        name="m",
        architecture=Architecture(name="cnn", arguments={}),
        input=InputSpec(name="image", shape=(2, 4, 4), dtype="float32"),
        preprocessing=Preprocessing(scale=SCALE, mean=MEAN, std=STD),
        classes=("a", "b"),
        metrics={},
        config_sha256="0" * 64,
    )
    manifest = Manifest(
        **description.model_dump(),
        format="syncbn-bundle",
        format_version=2,
        weights=Weights(file="model.safetensors", sha256="0" * 64, size_bytes=0),
        versions=Versions(syncbn="0", torch="0"),
    )
    return Bundle(manifest, model.eval())


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)
    )


def _samples(rows: int, shift: float = 0.0, stretch: float = 1.0) -> NDArray[np.float32]:
    """Return raw samples that preprocessing makes N(shift, stretch²)."""
    normal = np.random.default_rng(rows).standard_normal((rows, 2, 4, 4)) * stretch + shift
    mean, std = (np.reshape(each, (2, 1, 1)) for each in (MEAN, STD))
    return ((normal * std + mean) / SCALE).astype(np.float32)


def _report(samples: NDArray[np.float32], model: nn.Module, **options: Any) -> DriftReport:
    watch = DriftWatch(_bundle(model), clock=Clock(), **options)
    for first in range(0, len(samples), 16):
        watch.observe(samples[first : first + 16])
    return watch.report()


def test_moments_are_those_of_all_samples_together() -> None:
    samples, model = _samples(400, 0.5, 1.5), _model()
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(0.125)
    norm.running_var.fill_(4.0)
    report = _report(samples, model)
    shape = (1, 2, 1, 1)
    exact = (samples.astype(np.float64) * SCALE - np.reshape(MEAN, shape)) / np.reshape(STD, shape)
    with torch.no_grad():
        hidden = model[:2](torch.from_numpy(exact).float()).double().numpy()

    def distance(x: NDArray[np.float64], mean: float, std: float) -> NDArray[np.float64]:
        axes = (0, 2, 3)
        return np.hypot((x.mean(axes) - mean) / std, x.std(axes) / std - 1)

    assert report.samples == 400
    assert report.channels == pytest.approx(distance(exact, 0, 1), rel=1e-5)
    assert report.input_distance == pytest.approx(
        np.sqrt(np.mean(distance(exact, 0, 1) ** 2)), rel=1e-5
    )
    first, second = report.layers
    assert (first.name, first.batches, second.name) == ("0", 25, "2")
    expected = distance(hidden, 0.125, np.sqrt(4 + 1e-5))
    assert second.distance == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-4)


@pytest.mark.parametrize(
    ("shift", "stretch", "distance"), [(0, 1, 0), (1, 1, 1), (-3, 1, 3), (0, 3, 2), (0, 0.5, 0.5)]
)
def test_distance_tells_shift_and_stretch_in_standard_deviations(
    shift: float, stretch: float, distance: float
) -> None:
    report = _report(_samples(2000, shift, stretch), _model())
    assert report.input_distance == pytest.approx(distance, abs=0.05)
    assert report.layers[0].distance == pytest.approx(distance, abs=0.05)


def test_few_samples_tell_nothing() -> None:
    report = _report(_samples(31), _model())
    assert (report.samples, report.input_distance, report.channels) == (31, None, None)
    assert [layer.distance for layer in report.layers] == [None, None]
    assert _report(_samples(32), _model()).input_distance is not None


def test_old_samples_are_forgotten() -> None:
    shifted, usual = _samples(2_000, 5.0), _samples(12_000)
    watch = DriftWatch(_bundle(nn.Identity()), clock=Clock(), max_rows=1000)
    for _ in range(3):
        for samples in (shifted, usual, usual, usual):
            for first in range(0, len(samples), 1000):
                watch.observe(samples[first : first + 1000])
    distance = watch.report().input_distance
    assert distance is not None
    assert distance < 0.3  # 2 000 of 38 000 in all would give some 0.7


def test_watching_takes_its_share_of_the_time_alone() -> None:
    clock = Clock()
    watch = DriftWatch(_bundle(_model()), share=0.01, clock=clock)
    clock.step_s = 0.5  # what each look at the clock takes
    watch.observe(_samples(16))
    clock.step_s = 0
    assert watch.report().samples == 16
    for now_s, samples in ((50.9, 16), (51.1, 32), (51.2, 48)):
        clock.now_s = now_s
        watch.observe(_samples(16))
        assert watch.report().samples == samples


def test_rows_are_limited_and_those_that_are_not_finite_passed_over() -> None:
    samples = _samples(64)
    samples[::2] = np.inf
    watch = DriftWatch(_bundle(_model()), clock=Clock(), max_rows=64)
    watch.observe(samples)
    assert watch.report().samples == 32
    assert watch.report().input_distance == pytest.approx(0, abs=0.3)
    watch = DriftWatch(_bundle(_model()), clock=Clock(), max_rows=5)
    watch.observe(_samples(64))
    assert watch.report().samples == 5


def test_failure_ends_the_watch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    watch = DriftWatch(_bundle(Failing()), clock=Clock())
    watch.observe(_samples(4))
    watch.observe(_samples(4))
    assert caplog.text.count("drift is not watched any more") == 1
    assert watch.report().samples == 0


class _Changing(nn.Module):
    """A layer's input is changed in place when the layer has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.norm(input=x)
        return y.mean((2, 3)) + x.add_(100).mean((2, 3))


def test_input_that_is_changed_in_place_is_seen_as_it_was() -> None:
    assert _report(_samples(2000), _Changing()).layers[0].distance == pytest.approx(0, abs=0.05)


class _Repeating(_Changing):
    """A layer is called twice: with x, and with x + 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(x) + self.norm(x + 10)).mean((2, 3))


def test_layer_that_is_called_twice_is_seen_with_both_inputs() -> None:
    layer = _report(_samples(2000), _Repeating()).layers[0]
    # The two together have mean 5 and variance 1 + 25.
    assert layer.distance == pytest.approx(np.hypot(5, 26**0.5 - 1), rel=0.01)
    assert layer.batches == 125
    assert _report(_samples(31), _Repeating()).layers[0].distance is None


def test_what_others_ask_of_the_model_is_not_watched() -> None:
    bundle = _bundle(_model())
    watch = DriftWatch(bundle, clock=Clock())
    bundle.probabilities(torch.from_numpy(_samples(16, 100.0)))
    for _ in range(4):
        watch.observe(_samples(16))
    distance = watch.report().layers[0].distance
    assert distance is not None
    assert distance < 1


def test_samples_of_others_memory_are_watched_and_left_alone() -> None:
    samples = _samples(16)
    samples.setflags(write=False)
    watch = DriftWatch(_bundle(_model()), clock=Clock())
    for each in (samples, samples[::-1, :, ::-1]):
        watch.observe(each)
    assert watch.report().samples == 32


def test_watch_that_is_closed_while_it_looks_ends_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Closing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            watch.close()
            raise RuntimeError("OrderedDict mutated during iteration")

    watch = DriftWatch(_bundle(Closing()), clock=Clock())
    watch.observe(_samples(4))
    assert not caplog.text
    assert watch.report().samples == 0


def test_closed_watch_keeps_no_model_alive() -> None:
    model = _model()
    watch = DriftWatch(_bundle(model), clock=Clock())
    watch.observe(_samples(4))
    gone = weakref.ref(model)
    gc.disable()
    try:
        watch.close()
        del model
        assert gone() is None
    finally:
        gc.enable()
    watch.observe(_samples(4))
    assert watch.report().samples == 4


def test_reports_may_be_asked_for_meanwhile() -> None:
    watch = DriftWatch(_bundle(_model()), clock=Clock())
    reports: list[DriftReport] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            reports.append(watch.report())

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(50):
        watch.observe(_samples(16))
    done.set()
    thread.join(30)
    seen = [report.samples for report in reports]
    assert seen == sorted(seen)
    assert watch.report().samples == 800


# The routes


def test_drift_is_told_by_api_and_metrics(models: Path) -> None:
    app = create_app(Settings(models=models))
    with TestClient(app) as client:
        empty = client.get("/v2/models/shapes/drift").json()
        assert (empty["samples"], empty["input"]) == (0, {"distance": None, "channels": None})
        assert "syncbn_input_drift{" not in client.get("/metrics").text
        app.state.registry.get("shapes").watch._share = 1e9
        # Four standard deviations off: (x·0.5 − 0.25)/2.
        tensor = {"name": "image", "shape": [8, 1, 4, 4], "datatype": "FP32", "data": [16.5] * 128}
        for _ in range(5):
            client.post("/v2/models/shapes/infer", json={"inputs": [tensor]})
        drift = client.get("/v2/models/shapes/versions/1/drift").json()
        assert (drift["model_name"], drift["model_version"]) == ("shapes", "1")
        assert drift["samples"] == 40
        assert drift["input"]["distance"] == pytest.approx(17**0.5, rel=1e-5)
        assert [layer["name"] for layer in drift["layers"]] == ["1", "4", "7", "10"]
        assert all(layer["batches"] == 5 for layer in drift["layers"])
        text = client.get("/metrics").text
        assert 'syncbn_input_drift{model="shapes",version="1"} 4.12' in text
        assert 'syncbn_layer_drift{layer="10",model="shapes",version="1"}' in text


def test_drift_that_is_not_watched_says_so(models: Path) -> None:
    with TestClient(create_app(Settings(models=models, drift=False))) as client:
        answer = client.get("/v2/models/shapes/drift")
        assert answer.status_code == 404
        assert "--no-drift" in answer.json()["error"]
