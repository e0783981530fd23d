import gzip
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.models import tensors
from service.models.tensors import Array
from service.settings import Settings
from syncbn.bundle import read_bundle
from tests.service.conftest import write_small_bundle

INFER = "/v2/models/shapes/infer"
IMAGE = [[[0.5] * 4] * 4]


def _input(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [1, 1, 4, 4], "datatype": "FP32", "data": [0.5] * 16}
    return {"inputs": [tensor | changes]}


EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2", {"name": "syncbn", "version": "0.1.0", "extensions": EXTENSIONS}),
        ("/v2/models/shapes/ready", {"name": "shapes", "ready": True}),
        ("/v2/models/shapes/versions/1/ready", {"name": "shapes", "ready": True}),
        (
            "/v2/models/shapes/config",
            {
                "name": "shapes",
                "platform": "syncbn_bundle",
                "backend": "syncbn",
                "max_batch_size": 100,
                "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [1, 4, 4]}],
                "output": [
                    {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [3]},
                    {"name": "label", "data_type": "TYPE_STRING", "dims": [1]},
                ],
            },
        ),
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
        "versions": ["1"],
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
    assert client.get("/v2/models/shapes/versions/1").json() == metadata


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
        (b"", "the body is not an inference request: Input data was truncated"),
        (b"{", "the body is not an inference request: Input data was truncated"),
        (b"\xff\xfe", "JSON is malformed: invalid character (byte 0)"),
        (b"[" * 50_000, "Expected `object`, got `array`"),
        (b'{"x":' + b"[" * 50_000, "maximum recursion depth exceeded"),
        (b"[]", "Expected `object`, got `array`"),
        ({}, "Object missing required field `inputs`"),
        ({"inputs": [1]}, "Expected `object`, got `int` - at `$.inputs[0]`"),
        ({"inputs": []}, "expected the one input 'image', got []"),
        (_input(name="picture"), "expected the one input 'image', got ['picture']"),
        (_input(datatype="INT64"), "list of INT64 numbers"),
        (_input(datatype="BOOL"), "must have datatype FP32, or one of"),
        (_input(datatype=7), "Expected `str`, got `int` - at `$.inputs[0].datatype`"),
        (_input(shape=[1, 1, 5, 5]), "must have shape [-1, 1, 4, 4] with at least one sample, got"),
        (_input(shape=[16]), "must have shape [-1, 1, 4, 4]"),
        (_input(shape=[]), "must have shape [-1, 1, 4, 4]"),
        (_input(shape=[0, 1, 4, 4], data=[]), "with at least one sample, got [0, 1, 4, 4]"),
        (_input(shape=[-1, 1, 4, 4]), "Expected `int` >= 0 - at `$.inputs[0].shape[0]`"),
        (_input(shape=[1.5, 1, 4, 4]), "Expected `int`, got `float` - at `$.inputs[0].shape[0]`"),
        (_input(shape=[2, 1, 4, 4]), "has 16 elements, but its shape [2, 1, 4, 4] has 32"),
        (_input(shape=[10**400, 1, 4, 4]), "inputs[0].shape[0]"),
        (_input(shape=[1] * 9), "Expected `array` of length <= 8 - at `$.inputs[0].shape`"),
        (_input(shape=[101, 1, 4, 4]), "101 samples in one request; send at most 100"),
        (_input(data=[[0.5] * 8] * 2), "flat or nested as its shape [1, 1, 4, 4]"),
        (_input(data=[[0.5] * 15, [0.5]]), "flat or nested as its shape [1, 1, 4, 4]"),
        (_input(data=[[[[0.5] * 4] * 3]]), "is not nested as its shape [1, 1, 4, 4]"),
        (_input(data=[[[[0.5] * 4] * 3 + [[0.5] * 3]]]), "is not nested as its shape"),
        (_input(data=["a"] * 16), "Expected `float`, got `str`"),
        (_input(data=[True] * 16), "Expected `float`, got `bool`"),
        (_input(data=[None] * 16), "Expected `float`, got `null`"),
        (_input(data=[True] + [0.5] * 15), "Expected `float`, got `bool`"),
        (_input(data=[0.5] * 15 + [[0.5]]), "Expected `float`, got `array`"),
        (_input(data=["a" * 90_000] + [1] * 15), "Expected `float`, got `str`"),
        (_input(data=[10**400] * 16), "Number out of range"),
        (_input(data=[{}] * 16), "Expected `float`, got `object`"),
        (_input(data=0.5), "Expected `array`, got `float`"),
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
    assert "JSON is malformed" in response.json()["error"]


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


@contextmanager
def _with_predictor(
    models: Path,
    predict: Callable[[Array], Array],
    executor: ThreadPoolExecutor | None = None,
    **settings: Any,
) -> Generator[TestClient]:
    """Yield a client of a service whose model answers with another function once it is loaded."""
    app = create_app(Settings(models=models, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        model = app.state.registry.get("shapes")
        model.batcher._predict, model.batcher._executor = predict, executor
        yield client


def test_failure_of_the_model_tells_the_log_and_not_the_client(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(samples: Array) -> Array:
        raise RuntimeError("secret detail")

    with _with_predictor(models, fail) as client:
        response = client.post(INFER, json=_input())
    assert response.status_code == 500
    message = "model 'shapes' failed on this input; the server's log says more"
    assert response.json() == {"error": message}
    assert "secret detail" in caplog.text


def test_failure_of_our_own_tells_the_log_and_not_the_client(
    models: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(tensors, "write_response", fail)
    with TestClient(create_app(Settings(models=models))) as client:
        response = client.post(INFER, json=_input())
        assert response.status_code == 500
        assert response.json() == {"error": "internal error; the server's log says more"}
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "secret detail" in caplog.text
        counted = client.get("/metrics").text
    assert 'syncbn_model_requests_total{model="shapes",outcome="failed",version="1"} 1.0' in counted


def test_answer_that_is_not_finite_is_refused(models: Path) -> None:
    def overflow(samples: Array) -> Array:
        return np.full((len(samples), 3), np.nan, np.float32)

    with _with_predictor(models, overflow) as client:
        response = client.post(INFER, json=_input())
    assert response.status_code == 400
    assert "model 'shapes' overflowed on this input" in response.json()["error"]


def _dawdle(samples: Array) -> Array:
    time.sleep(0.5)
    return np.full((len(samples), 3), 1 / 3, np.float32)


@pytest.mark.parametrize("by", ["service", "request"])
def test_answer_that_takes_too_long_is_refused(models: Path, by: str) -> None:
    timeout = {"timeout": 50_000} if by == "request" else {}
    settings = {"timeout_s": 0.05} if by == "service" else {}
    # Inline, the forward would have to end before anybody can look at the clock.
    with (
        ThreadPoolExecutor(1) as thread,
        _with_predictor(models, _dawdle, thread, **settings) as client,
    ):
        response = client.post(INFER, json=_input() | {"parameters": timeout})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "no answer from 'shapes' within 0.05" in response.json()["error"]


@pytest.mark.parametrize("timeout", [0, -1, 0.5, "1", True, 10**20])
def test_timeout_that_is_none_is_refused(client: TestClient, timeout: object) -> None:
    response = client.post(INFER, json=_input() | {"parameters": {"timeout": timeout}})
    assert response.status_code == 400
    assert "timeout must be a number of microseconds" in response.json()["error"]


def test_request_larger_than_a_batch_is_answered_in_parts(client: TestClient, models: Path) -> None:
    x = torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    body = client.post(INFER, json=_input(shape=list(x.shape), data=x.flatten().tolist())).json()
    probabilities = torch.tensor(body["outputs"][0]["data"]).reshape(100, 3)
    expected = read_bundle(models / "one").probabilities(x)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_are_compressed_both_ways(client: TestClient, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    x = [0.5] * 16 * 50
    content = json.dumps(_input(shape=[50, 1, 4, 4], data=x)).encode()
    headers = {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    response = client.post(INFER, content=compress(content), headers=headers)
    assert response.status_code == 200
    assert response.headers["content-encoding"] == encoding
    plain = client.post(INFER, content=content, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert response.json() == plain.json()
    small = client.get("/v2/models/shapes", headers=headers)
    assert "content-encoding" not in small.headers


@pytest.mark.parametrize(
    ("content", "encoding", "status", "message"),
    [
        (b"{}", "br", 415, "Content-Encoding 'br' is not known"),
        (b"no gzip", "gzip", 400, "the body is not gzip"),
        (gzip.compress(b"{}", mtime=0)[:-1], "gzip", 400, "not one whole gzip stream"),
        (gzip.compress(b"{}", mtime=0) + b"x", "gzip", 400, "not one whole gzip stream"),
        (gzip.compress(bytes(10_000_000)), "gzip", 413, "larger than 100000 bytes without gzip"),
    ],
)
def test_wrong_compression_is_refused(
    client: TestClient, content: bytes, encoding: str, status: int, message: str
) -> None:
    headers = {"Content-Encoding": encoding}
    response = client.post(INFER, content=content, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]


@pytest.mark.parametrize("length", ["", "x", "-1", "1.5", "９", "1" * 19])
def test_wrong_length_of_the_json_is_refused(client: TestClient, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode()}
    response = client.post(INFER, json=_input(), headers=headers)  # pyright: ignore[reportArgumentType] -- bytes will do
    assert response.status_code == 400
    assert "must be a number of bytes" in response.json()["error"]


def test_raw_sample_gets_a_binary_answer(client: TestClient, models: Path) -> None:
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    headers = {"Inference-Header-Content-Length": "0"}
    response = client.post(INFER, content=x.numpy().tobytes(), headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["inference-header-content-length"])
    answer = np.frombuffer(response.content[length : length + 12], np.float32)
    expected = read_bundle(models / "one").probabilities(x)[0]
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-6)


def test_statistics_count_requests_rows_and_forwards(models: Path) -> None:
    with TestClient(create_app(Settings(models=models))) as client:
        for _ in range(3):
            client.post(INFER, json=_input(shape=[2, 1, 4, 4], data=[0.5] * 32))
        client.post(INFER, json=_input(shape=[3]))
        for path in ("/v2/models/stats", "/v2/models/shapes/stats"):
            (stats,) = client.get(path).json()["model_stats"]
            assert (stats["name"], stats["version"]) == ("shapes", "1")
            assert (stats["inference_count"], stats["execution_count"]) == (6, 3)
            assert stats["inference_stats"]["success"]["count"] == 3
            assert stats["inference_stats"]["fail"]["count"] == 1
            assert stats["inference_stats"]["compute_infer"]["ns"] > 0


def test_every_answer_is_secured_and_has_an_id(client: TestClient) -> None:
    answers = [client.get(path) for path in ("/v2", "/nope", "/", "/openapi.json")]
    for answer in (*answers, client.post(INFER, json=_input()), client.post(INFER)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", answer.headers["x-request-id"])
        assert "server" not in answer.headers
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(answers)


def test_id_of_a_request_is_kept_if_it_is_one(client: TestClient) -> None:
    for sent, kept in (("a-Z_9.", True), ("a b", False), ("x" * 65, False), ("", False)):
        answer = client.get("/v2", headers={"X-Request-Id": sent})
        assert (answer.headers["x-request-id"] == sent) is kept


def test_other_origins_are_let_in_only_where_they_are_named(models: Path) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with TestClient(create_app(Settings(models=models))) as client:
        answer = client.options(INFER, headers=asked)
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in client.get("/v2", headers=asked).headers
    named = Settings(models=models, cors_origins=["https://a.example"])
    with TestClient(create_app(named)) as client:
        answer = client.options(INFER, headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = client.get("/v2", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_settings_come_from_the_environment(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_MODELS", str(models))
    monkeypatch.setenv("SYNCBN_TIMEOUT_S", "1.5")
    assert Settings() == Settings(models=models, timeout_s=1.5)  # pyright: ignore[reportCallIssue] -- the environment has the rest
    with TestClient(create_app()) as client:
        assert client.get("/v2/health/ready").status_code == 200


def test_documentation_page_is_served(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    assert INFER.replace("shapes", "{name}") in client.get("/openapi.json").json()["paths"]


def test_model_that_takes_long_holds_up_no_other(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "one")
    write_small_bundle(tmp_path / "two", "twins")
    started, go_on = threading.Event(), threading.Event()

    def dawdle(samples: Array) -> Array:
        started.set()
        assert go_on.wait(60)
        return np.full((len(samples), 3), 1 / 3, np.float32)

    app = create_app(Settings(models=tmp_path))
    with ThreadPoolExecutor(2) as threads, TestClient(app) as client:
        batcher = app.state.registry.get("twins").batcher
        batcher._predict, batcher._executor = dawdle, threads
        slow = threads.submit(client.post, "/v2/models/twins/infer", json=_input())
        assert started.wait(60)
        try:
            for _ in range(5):
                assert client.post(INFER, json=_input()).status_code == 200
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result(60).status_code == 200
