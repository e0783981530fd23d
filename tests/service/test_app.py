import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from syncbn.bundle import Bundle, read_bundle

INFER = "/v2/models/shapes/infer"
IMAGE = [[[0.5] * 4] * 4]


def _input(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [1, 1, 4, 4], "datatype": "FP32", "data": [0.5] * 16}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2", {"name": "syncbn", "version": "0.1.0", "extensions": []}),
        ("/v2/models/shapes/ready", {"name": "shapes", "ready": True}),
    ],
)
def test_server_says_what_it_is(client: TestClient, path: str, expected: dict[str, Any]) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == expected


def test_models_are_listed_with_their_metadata(client: TestClient) -> None:
    metadata = client.get("/v2/models/shapes").json()
    assert metadata == {
        "name": "shapes",
        "platform": "syncbn_bundle",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 4, 4]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {
            "architecture": "cnn",
            "classes": ["circle", "square", "star"],
            "metrics": {"test_accuracy": 0.875},
        },
    }
    assert client.get("/v2/models").json() == {"models": [metadata]}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("nested", [True, False])
def test_answer_is_that_of_the_model_in_evaluation_mode(
    client: TestClient, models: Path, rows: int, nested: bool
) -> None:
    x = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(rows))
    data = x.tolist() if nested else x.flatten().tolist()
    response = client.post(INFER, json={"id": "7", **_input(shape=list(x.shape), data=data)})
    assert response.status_code == 200
    body = response.json()
    expected = read_bundle(models / "one").probabilities(x)
    assert (body["model_name"], body["id"]) == ("shapes", "7")
    probabilities, label = body["outputs"]
    assert probabilities["shape"] == [rows, 3]
    torch.testing.assert_close(
        torch.tensor(probabilities["data"]).reshape(rows, 3), expected, rtol=0, atol=1e-6
    )
    classes = ("circle", "square", "star")
    assert label["data"] == [classes[index] for index in expected.argmax(1).tolist()]
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [rows])


def test_only_the_outputs_asked_for_are_sent(client: TestClient) -> None:
    body = client.post(INFER, json=_input() | {"outputs": [{"name": "label"}]}).json()
    assert [output["name"] for output in body["outputs"]] == ["label"]
    assert "id" not in body


def test_content_type_and_unknown_keys_do_not_matter(client: TestClient) -> None:
    content = json.dumps(_input() | {"model_name": "shapes", "parameters": {"x": 1}})
    assert client.post(INFER, content=content).status_code == 200
    headers = {"content-type": "application/octet-stream"}
    assert client.post(INFER, content=content, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: Invalid JSON"),
        (b"{", "body: Invalid JSON"),
        (b"\xff\xfe", "body: Invalid JSON"),
        (b"[" * 50_000, "body: Invalid JSON"),
        (b"[]", "body: Input should be an object"),
        ({}, "inputs: Field required"),
        ({"inputs": [1]}, "inputs.0: Input should be an object"),
        ({"inputs": []}, "expected the one input 'image', got []"),
        (_input(name="picture"), "expected the one input 'image', got ['picture']"),
        (_input(datatype="INT64"), "must have datatype FP32, got 'INT64'"),
        (_input(datatype=7), "inputs.0.datatype: Input should be a valid string"),
        (_input(shape=[1, 1, 5, 5]), "must have shape [-1, 1, 4, 4] with at least one sample, got"),
        (_input(shape=[16]), "must have shape [-1, 1, 4, 4]"),
        (_input(shape=[]), "must have shape [-1, 1, 4, 4]"),
        (_input(shape=[0, 1, 4, 4], data=[]), "with at least one sample, got [0, 1, 4, 4]"),
        (_input(shape=[-1, 1, 4, 4]), "inputs.0.shape.0: Input should be greater than or equal"),
        (_input(shape=[1.5, 1, 4, 4]), "inputs.0.shape.0: Input should be a valid integer"),
        (_input(shape=[2, 1, 4, 4]), "has 16 elements, but its shape [2, 1, 4, 4] has 32"),
        (_input(shape=[10**4299, 1, 4, 4]), "inputs.0.shape.0: Input should be"),
        (_input(shape=[1] * 9), "inputs.0.shape: List should have at most 8 items"),
        (_input(shape=[101, 1, 4, 4]), "101 samples in one request; send at most 100"),
        (_input(data=[[0.5] * 8] * 2), "is not nested as its shape [1, 1, 4, 4]"),
        (_input(data=[[0.5] * 15, [0.5]]), "is not nested as its shape [1, 1, 4, 4]"),
        (_input(data=["a"] * 16), "must be numbers alone"),
        (_input(data=[True] * 16), "must be numbers alone"),
        (_input(data=[None] * 16), "must be numbers alone"),
        (_input(data=[True] + [0.5] * 15), "must be numbers alone"),
        (_input(data=[0.5] * 15 + [[0.5]]), "must be numbers alone"),
        (_input(data=["a" * 90_000] + [1] * 15), "must be numbers alone"),
        (_input(data=[10**400] * 16), "not finite in FP32"),
        (_input(data=[{}] * 16), "must be numbers alone"),
        (_input(data=0.5), "inputs.0.data: Input should be a valid array"),
        (_input(data=[1e39] * 16), "not finite in FP32"),
        (_input() | {"outputs": [{"name": "label"}] * 2}, "asked for twice"),
        (_input(name="n" * 5000), "expected the one input 'image', got ['nnn"),
        (_input() | {"outputs": [{"name": "logits"}]}, "unknown output 'logits'; choose of prob"),
    ],
)
def test_wrong_request_is_refused_with_a_message(
    client: TestClient, body: bytes | dict[str, Any], message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post(INFER, content=content)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert message in response.json()["error"]
    assert "Traceback" not in response.text
    assert len(response.text) < 1100
    assert client.post(INFER, json=_input()).status_code == 200


def test_not_a_number_in_json_is_refused(client: TestClient) -> None:
    content = json.dumps(_input(data=[float("nan")] * 16))
    response = client.post(INFER, content=content)
    assert response.status_code == 400
    assert "not finite in FP32" in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/cars", 404, "no model 'cars'; loaded: shapes"),
        ("GET", "/v2/models/cars/ready", 404, "no model 'cars'"),
        ("POST", "/v2/models/cars/infer", 404, "no model 'cars'"),
        ("GET", "/v3", 404, "GET /v3: Not Found"),
        ("GET", INFER, 405, f"GET {INFER}: Method Not Allowed"),
        ("DELETE", "/v2/models/shapes", 405, "Method Not Allowed"),
        ("GET", "/v2/health/live/", 404, "Not Found"),
    ],
)
def test_wrong_path_is_refused_with_a_message(
    client: TestClient, method: str, path: str, status: int, message: str
) -> None:
    response = client.request(method, path, content=json.dumps(_input()))
    assert response.status_code == status
    assert message in response.json()["error"]


def test_body_over_the_limit_is_refused(client: TestClient) -> None:
    response = client.post(INFER, content=b" " * 100_001)
    assert response.status_code == 413
    assert "larger than 100000 bytes" in response.json()["error"]


def test_threads_are_set(models: Path) -> None:
    before = torch.get_num_threads()
    try:
        create_app(Settings(models=models, threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_failure_of_our_own_tells_the_log_and_not_the_client(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Bundle, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Bundle, "probabilities", fail)
    response = client.post(INFER, json=_input())
    assert response.status_code == 500
    assert response.json() == {"error": "internal error; the server's log says more"}
    assert "secret detail" in caplog.text


def test_answer_that_is_not_finite_is_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "probabilities", lambda self, x: torch.full((1, 3), float("nan")))
    response = client.post(INFER, json=_input())
    assert response.status_code == 400
    assert "model 'shapes' overflowed on this input" in response.json()["error"]


def test_answer_that_takes_too_long_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dawdle(self: Bundle, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return torch.full((1, 3), 1 / 3)

    monkeypatch.setattr(Bundle, "probabilities", dawdle)
    with TestClient(create_app(Settings(models=models, timeout_s=0.05))) as client:
        response = client.post(INFER, json=_input())
    assert response.status_code == 503
    assert "no answer from 'shapes' within 0.05 s" in response.json()["error"]


def test_settings_come_from_the_environment(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_MODELS", str(models))
    monkeypatch.setenv("SYNCBN_TIMEOUT_S", "1.5")
    assert Settings() == Settings(models=models, timeout_s=1.5)  # pyright: ignore[reportCallIssue] -- the environment has the rest
    with TestClient(create_app()) as client:
        assert client.get("/v2/health/ready").status_code == 200


def test_documentation_page_is_served(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    assert INFER.replace("shapes", "{name}") in client.get("/openapi.json").json()["paths"]
