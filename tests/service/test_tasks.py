"""Models that answer a class for each pixel, or any tensor."""

import base64
import io
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.models.images import read_image
from service.settings import Settings
from syncbn.bundle import Bundle, read_bundle
from tests.support.task_bundles import (
    EVALUATION,
    GROUNDS,
    PALETTE,
    write_segmenter,
    write_vectors,
)

VERSION_1 = Path(__file__).parents[1] / "support" / "bundles" / "version_1"
JSON_BYTES = "Inference-Header-Content-Length"
ROWS = 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("tasks")
    write_segmenter(models / "segments", palette=PALETTE, evaluations=(EVALUATION,))
    write_vectors(models / "vectors", classes=(*GROUNDS,))
    return models


def _settings(models: Path, **changes: Any) -> Settings:
    return Settings(models=models, allow_imports=True, max_batch_size=4, **changes)


@pytest.fixture(scope="module")
def ask(tasks: Path) -> Generator[TestClient]:
    with TestClient(create_app(_settings(tasks)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def samples() -> NDArray[np.float32]:
    return np.random.default_rng(0).random((ROWS, 1, 6, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def segments(tasks: Path) -> Bundle:
    return read_bundle(tasks / "segments", allow_imports=True)


def _infer(
    client: TestClient, model: str, samples: NDArray[np.float32], **request: Any
) -> dict[str, Any]:
    tensor = {"name": "image", "shape": list(samples.shape), "datatype": "FP32"}
    body = {"inputs": [tensor | {"data": samples.ravel().tolist()}], **request}
    response = client.post(f"/v2/models/{model}/infer", json=body)
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def test_segmentation_answers_the_mask_unless_asked_for_more(
    ask: TestClient, segments: Bundle, samples: NDArray[np.float32]
) -> None:
    expected = segments.probabilities(torch.from_numpy(samples)).numpy()
    outputs = _infer(ask, "segments", samples)
    assert list(outputs) == ["mask"]
    assert outputs["mask"]["datatype"] == "UINT8"
    assert outputs["mask"]["shape"] == [ROWS, 6, 8]
    mask = np.reshape(outputs["mask"]["data"], (ROWS, 6, 8))
    np.testing.assert_array_equal(mask, expected.argmax(1))
    assert len(np.unique(mask)) > 1

    asked = [{"name": "probabilities"}, {"name": "mask"}]
    outputs = _infer(ask, "segments", samples, outputs=asked)
    assert list(outputs) == ["probabilities", "mask"]
    assert outputs["probabilities"]["shape"] == [ROWS, 3, 6, 8]
    got = np.reshape(outputs["probabilities"]["data"], expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.ravel(outputs["mask"]["data"]), mask.ravel())


def test_binary_mask_has_a_byte_a_pixel(
    ask: TestClient, segments: Bundle, samples: NDArray[np.float32]
) -> None:
    response = ask.post(
        "/v2/models/segments/infer", content=samples[:1].tobytes(), headers={JSON_BYTES: "0"}
    )
    head = int(response.headers[JSON_BYTES])
    outputs = json.loads(response.content[:head])["outputs"]
    assert outputs == [
        {
            "name": "mask",
            "shape": [1, 6, 8],
            "datatype": "UINT8",
            "parameters": {"binary_data_size": 48},
        }
    ]
    expected = segments.probabilities(torch.from_numpy(samples[:1])).argmax(1).numpy()
    got = np.frombuffer(response.content[head:], np.uint8).reshape(1, 6, 8)
    np.testing.assert_array_equal(got, expected)


def test_tensor_is_answered_as_it_is(
    ask: TestClient, tasks: Path, samples: NDArray[np.float32]
) -> None:
    bundle = read_bundle(tasks / "vectors", allow_imports=True)
    outputs = _infer(ask, "vectors", samples)
    assert list(outputs) == ["output"]
    assert outputs["output"]["shape"] == [ROWS, 3]
    expected = bundle.outputs(torch.from_numpy(samples)).numpy()
    got = np.reshape(outputs["output"]["data"], expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert (got < 0).any()  # and so no probabilities


def test_metadata_and_configuration_list_the_outputs_of_the_task(ask: TestClient) -> None:
    metadata = ask.get("/v2/models/segments").json()
    assert metadata["outputs"] == [
        {"name": "mask", "datatype": "UINT8", "shape": [-1, 6, 8]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3, 6, 8]},
    ]
    parameters = metadata["parameters"]
    assert parameters["task"] == "segmentation"
    assert parameters["palette"] == [list(color) for color in PALETTE]
    assert parameters["evaluations"] == [EVALUATION.model_dump()]
    assert ask.get("/v2/models/segments/config").json()["output"] == [
        {"name": "mask", "data_type": "TYPE_UINT8", "dims": [6, 8]},
        {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [3, 6, 8]},
    ]
    metadata = ask.get("/v2/models/vectors").json()
    assert metadata["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}]
    assert metadata["parameters"]["task"] == "tensor"


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("segments", {"name": "label"}, "unknown output 'label'; choose of mask and probabilities"),
        ("vectors", {"name": "probabilities"}, "unknown output 'probabilities'; choose of output"),
        (
            "segments",
            {"name": "probabilities", "parameters": {"classification": 2}},
            "output 'probabilities' has a class for each pixel; the parameter classification",
        ),
        (
            "vectors",
            {"name": "output", "parameters": {"classification": 2}},
            "output 'output' has no classes; the parameter classification is for models that",
        ),
    ],
)
def test_what_the_task_does_not_have_is_refused(
    ask: TestClient,
    samples: NDArray[np.float32],
    model: str,
    output: dict[str, Any],
    message: str,
) -> None:
    tensor = {"name": "image", "shape": [1, 1, 6, 8], "datatype": "FP32"}
    body = {"inputs": [tensor | {"data": samples[0].ravel().tolist()}], "outputs": [output]}
    response = ask.post(f"/v2/models/{model}/infer", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


@pytest.mark.parametrize("outputs", [None, [{"name": "probabilities"}]])
def test_overflow_is_refused_and_no_mask_of_it_sent(
    ask: TestClient, samples: NDArray[np.float32], outputs: list[dict[str, Any]] | None
) -> None:
    huge = samples.copy()
    huge[1, 0, 2, 3] = 3e38
    tensor = {"name": "image", "shape": list(huge.shape), "datatype": "FP32"}
    body = {"inputs": [tensor | {"data": huge.ravel().tolist()}], "outputs": outputs}
    response = ask.post("/v2/models/segments/infer", json=body)
    assert response.status_code == 400
    assert "'segments' overflowed on this input" in response.json()["error"]


def test_answer_that_would_be_too_large_is_refused_before_it_is_computed(
    tasks: Path, samples: NDArray[np.float32]
) -> None:
    with TestClient(create_app(_settings(tasks, max_answer_bytes=5000))) as client:
        _infer(client, "segments", samples)  # 5·48 numbers of one digit
        tensor = {"name": "image", "shape": list(samples.shape), "datatype": "FP32"}
        body: dict[str, Any] = {
            "inputs": [tensor | {"data": samples.ravel().tolist()}],
            "outputs": [{"name": "probabilities"}],
        }
        response = client.post("/v2/models/segments/infer", json=body)
        assert response.status_code == 400
        assert response.json()["error"].startswith(
            "the answer to 5 samples would have about 14400 bytes, of at most 5000; send fewer"
        )
        body["outputs"][0]["parameters"] = {"binary_data": True}
        assert client.post("/v2/models/segments/infer", json=body).status_code == 200
        assert (
            client.get("/v2/models/segments/stats").json()["model_stats"][0]["inference_count"]
            == 2 * ROWS
        )


def test_masks_and_tensors_of_too_many_images_are_refused(tasks: Path) -> None:
    settings = _settings(tasks, max_answer_bytes=3 * 48)
    files = [("files", (f"{at}.png", _picture())) for at in range(4)]
    with TestClient(create_app(settings)) as client:
        assert client.post("/predict/segments", files=files).status_code == 200
        assert client.post("/predict/segments?mask=png", files=files[:3]).status_code == 200
        for path in ("/predict/segments?mask=png", "/predict/vectors"):
            refused = client.post(path, files=files)
            assert refused.status_code == 400
            assert "the answer to 4 samples would have about" in refused.json()["error"]


# Images


def _picture(mode: str = "L", size: tuple[int, int] = (20, 12)) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0]), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def _expected_mask(segments: Bundle, content: bytes) -> NDArray[np.int64]:
    raw = read_image(content, segments.manifest, max_pixels=10_000)
    return segments.probabilities(torch.from_numpy(raw)[None]).argmax(1)[0].numpy()


def test_image_is_answered_with_the_share_of_each_class(ask: TestClient, segments: Bundle) -> None:
    content = _picture()
    mask = _expected_mask(segments, content)
    response = ask.post("/predict/segments", content=content, headers={"Content-Type": "image/png"})
    assert response.status_code == 200
    shares = {name: float((mask == index).mean()) for index, name in enumerate(GROUNDS)}
    prediction = {"shares": shares, "height": 6, "width": 8, "mask": None}
    assert response.json() == {
        "model_name": "segments",
        "model_version": "1",
        "predictions": [prediction],
    }


def test_picture_of_an_image_has_the_classes_as_indices_and_the_palette(
    ask: TestClient, segments: Bundle
) -> None:
    content = _picture()
    response = ask.post(
        "/predict/segments",
        content=content,
        headers={"Content-Type": "image/png", "Accept": "image/png"},
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(response.content))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), _expected_mask(segments, content))
    assert (picture.getpalette() or [])[:9] == [shade for color in PALETTE for shade in color]
    # The same one in JSON, on request.
    answer = ask.post(
        "/predict/segments?mask=png", content=content, headers={"Content-Type": "image/png"}
    ).json()
    assert base64.b64decode(answer["predictions"][0]["mask"]) == response.content


def test_several_images_are_answered_in_their_order_but_by_no_picture(
    ask: TestClient, segments: Bundle
) -> None:
    contents = [_picture(size=(8 + at, 9)) for at in range(6)]  # more than a batch
    files = [("files", (f"{at}.png", content)) for at, content in enumerate(contents)]
    answer = ask.post("/predict/segments", files=files).json()
    got = [each["shares"]["circle"] for each in answer["predictions"]]
    assert got == [float((_expected_mask(segments, each) == 1).mean()) for each in contents]
    refused = ask.post("/predict/segments", files=files, headers={"Accept": "image/png"})
    assert refused.status_code == 400
    assert "6 image files, but a picture answers one; send one at a time" in refused.json()["error"]


def test_other_pictures_than_png_are_not_to_be_had(ask: TestClient) -> None:
    response = ask.post(
        "/predict/segments?mask=gif", content=_picture(), headers={"Content-Type": "image/png"}
    )
    assert response.status_code == 400
    assert response.json()["error"] == "the parameter mask must be png, got 'gif'"


def test_image_is_answered_with_the_tensor(ask: TestClient, tasks: Path) -> None:
    content = _picture()
    bundle = read_bundle(tasks / "vectors", allow_imports=True)
    raw = torch.from_numpy(read_image(content, bundle.manifest, max_pixels=10_000))[None]
    answer = ask.post(
        "/predict/vectors", content=content, headers={"Content-Type": "image/png"}
    ).json()
    (prediction,) = answer["predictions"]
    assert prediction["shape"] == [3]
    np.testing.assert_allclose(prediction["output"], bundle.outputs(raw)[0], rtol=0, atol=1e-5)


def test_many_classes_have_wider_masks_and_no_picture(tmp_path: Path) -> None:
    classes = tuple(map(str, range(300)))
    write_segmenter(tmp_path / "many", classes=classes)
    with TestClient(create_app(_settings(tmp_path)), raise_server_exceptions=False) as client:
        metadata = client.get("/v2/models/segments").json()
        assert metadata["outputs"][0]["datatype"] == "UINT16"
        colors = {tuple(color) for color in metadata["parameters"]["palette"]}
        assert len(colors) == 300
        as_png = {"Content-Type": "image/png", "Accept": "image/png"}
        refused = client.post("/predict/segments", content=_picture(), headers=as_png)
        assert refused.status_code == 400
        assert "has room for 256 classes, and the model has 300" in refused.json()["error"]
        answer = client.post(
            "/predict/segments?mask=png", content=_picture(), headers={"Content-Type": "image/png"}
        ).json()
        assert answer["predictions"][0]["mask"] is None
        assert sum(answer["predictions"][0]["shares"].values()) == pytest.approx(1)


# Batches


@pytest.mark.parametrize(
    ("max_batch_bytes", "rows"),
    # A sample has 48 values of input and 3·48 of output, of 4 bytes each.
    [(256 << 20, 4), (3 * 768, 3), (2 * 768 - 1, 1), (1, 1)],
)
def test_batch_has_as_many_samples_as_its_bytes_allow(
    tasks: Path, samples: NDArray[np.float32], max_batch_bytes: int, rows: int
) -> None:
    settings = _settings(tasks, max_batch_bytes=max_batch_bytes)
    with TestClient(create_app(settings)) as client:
        _infer(client, "segments", samples)
        statistics = client.get("/v2/models/segments/stats").json()["model_stats"][0]
        assert statistics["inference_count"] == ROWS
        assert statistics["execution_count"] == -(-ROWS // rows)


def test_waiting_samples_are_limited_by_their_bytes(tasks: Path) -> None:
    app = create_app(_settings(tasks, max_queue_bytes=10 * 48 * 4))
    with TestClient(app):
        model = app.state.registry.get("segments")
        assert model.batcher._max_queue_rows == 10


def test_drift_of_a_segmentation_is_watched(ask: TestClient, samples: NDArray[np.float32]) -> None:
    _infer(ask, "segments", samples)
    drift = ask.get("/v2/models/segments/drift").json()
    assert drift["samples"] > 0
    assert [layer["name"] for layer in drift["layers"]] == ["1"]


# Bundles of before


def test_bundle_of_version_1_is_served_with_the_numbers_of_its_time() -> None:
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    samples = np.array(expected["samples"], np.float32)
    with TestClient(create_app(Settings(models=VERSION_1))) as client:
        outputs = _infer(client, "from-version-1", samples)
    got = np.reshape(outputs["probabilities"]["data"], (len(samples), 3))
    np.testing.assert_allclose(got, expected["probabilities"], rtol=0, atol=1e-5)
    wanted = np.argmax(expected["probabilities"], 1)
    names = ("circle", "square", "triangle")
    assert outputs["label"]["data"] == [names[index] for index in wanted]
