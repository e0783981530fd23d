"""The clients that people have speak with the service, as they are."""

import asyncio
from collections.abc import Generator
from pathlib import Path
from typing import Any

import kserve
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from syncbn.bundle import read_bundle
from tests.service.conftest import CLASSES
from tests.support.serving import Service, served
from tests.support.task_bundles import write_segmenter

# The clients' own dependencies are not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 3


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    with served(models, tmp_path_factory.mktemp("clients") / "log") as service:
        yield service


@pytest.fixture(scope="module")
def address(service: Service) -> str:
    return service.url.removeprefix("http://")


@pytest.fixture(scope="module")
def samples() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((ROWS, 1, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(models: Path, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    return read_bundle(models / "one").probabilities(torch.from_numpy(samples)).numpy()


def _input(module: Any, samples: NDArray[Any], *, binary: bool, datatype: str = "FP32") -> Any:
    tensor = module.InferInput("image", list(samples.shape), datatype)
    tensor.set_data_from_numpy(samples, binary_data=binary)
    return tensor


def _check(result: Any, expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, rtol=0, atol=1e-5)
    labels = [
        label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("label")
    ]
    assert labels == [CLASSES[index] for index in expected.argmax(1)]


@pytest.fixture(scope="module")
def client(address: str) -> Generator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


def test_triton_reads_health_metadata_config_and_statistics(
    client: triton.InferenceServerClient,
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shapes")
    assert client.is_model_ready("shapes", "1")
    assert not client.is_model_ready("cars")
    assert client.get_server_metadata()["name"] == "syncbn"
    metadata = client.get_model_metadata("shapes", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 4, 4]}]
    assert client.get_model_config("shapes")["max_batch_size"] == 1024
    (statistics,) = client.get_inference_statistics("shapes")["model_stats"]
    assert statistics["name"] == "shapes"


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_output", [True, False, None])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_infers(
    client: triton.InferenceServerClient,
    samples: NDArray[np.float32],
    expected: NDArray[np.float32],
    binary: bool,
    binary_output: bool | None,
    compression: str | None,
) -> None:
    outputs = None
    if binary_output is not None:
        outputs = [
            triton.InferRequestedOutput("probabilities", binary_data=binary_output),
            triton.InferRequestedOutput("label", binary_data=not binary_output),
        ]
    many = np.concatenate([samples] * 40)  # an answer that is worth compressing
    result = client.infer(
        "shapes",
        [_input(triton, many, binary=binary)],
        outputs=outputs,
        request_id="7",
        timeout=20_000_000,
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result is not None
    assert result.get_response()["id"] == "7"
    assert result.get_response()["model_version"] == "1"
    _check(result, np.concatenate([expected] * 40))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP64", "INT8", "INT64", "UINT8"])
def test_triton_sends_other_datatypes(
    client: triton.InferenceServerClient, models: Path, datatype: str
) -> None:
    samples = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    others = {"BF16": ml_dtypes.bfloat16, "FP16": "f2", "FP64": "f8"}
    sent = samples.astype(others.get(datatype, datatype.lower()))
    result = client.infer("shapes", [_input(triton, sent, binary=True, datatype=datatype)])
    assert result is not None
    _check(result, read_bundle(models / "one").probabilities(torch.from_numpy(samples)).numpy())


def test_triton_classifies(
    client: triton.InferenceServerClient,
    samples: NDArray[np.float32],
    expected: NDArray[np.float32],
) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer("shapes", [_input(triton, samples, binary=True)], outputs=outputs)
    assert result is not None
    classes = result.as_numpy("probabilities")
    assert classes is not None
    assert classes.shape == (ROWS, 2)
    value, index, name = classes[0, 0].decode().split(":")
    assert (int(index), name) == (expected[0].argmax(), CLASSES[expected[0].argmax()])
    assert float(value) == pytest.approx(expected[0].max(), abs=1e-5)


def test_triton_shows_our_errors(
    client: triton.InferenceServerClient, samples: NDArray[np.float32]
) -> None:
    with pytest.raises(InferenceServerException, match="no model 'cars'; loaded: shapes"):
        client.infer("cars", [_input(triton, samples, binary=True)])
    with pytest.raises(InferenceServerException, match="must have shape") as refusal:
        client.infer("shapes", [_input(triton, samples[:, :, :2], binary=True)])
    assert refusal.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no version"):
        client.get_model_metadata("shapes", "9")


def test_triton_lists_loads_and_unloads_models(client: triton.InferenceServerClient) -> None:
    ready = {"name": "shapes", "version": "1", "state": "READY", "reason": ""}
    assert client.get_model_repository_index() == [ready]
    client.unload_model("shapes", unload_dependents=True)
    assert not client.is_model_ready("shapes")
    (entry,) = client.get_model_repository_index()
    assert entry["state"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="send no parameters, got"):
        client.load_model("shapes", config="{}")
    client.load_model("shapes")
    assert client.is_model_ready("shapes")
    with pytest.raises(InferenceServerException, match="no model 'cars'"):
        client.load_model("cars")


def test_triton_aio_does_likewise(
    address: str, samples: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(address) as client, asyncio.timeout(60):
            assert await client.is_server_ready()
            assert await client.is_model_ready("shapes")
            assert (await client.get_model_metadata("shapes"))["name"] == "shapes"
            assert await client.get_model_repository_index()
            many = np.concatenate([samples] * 40)
            for binary in (True, False):
                for compression in (None, "gzip", "deflate"):
                    result = await client.infer(
                        "shapes",
                        [_input(triton_aio, many, binary=binary)],
                        request_compression_algorithm=compression,
                        response_compression_algorithm=compression,
                    )
                    _check(result, np.concatenate([expected] * 40))
            with pytest.raises(InferenceServerException, match="no model 'cars'"):
                await client.infer("cars", [_input(triton_aio, samples, binary=True)])

    asyncio.run(run())


@pytest.mark.parametrize("binary", [True, False])
def test_kserve_infers(
    service: Service,
    samples: NDArray[np.float32],
    expected: NDArray[np.float32],
    binary: bool,
) -> None:
    async def run() -> None:
        config = kserve.RESTConfig(protocol="v2", timeout=60)
        client = kserve.InferenceRESTClient(config)
        try:
            url = service.url
            assert await client.is_server_live(url)
            assert await client.is_server_ready(url)
            assert await client.is_model_ready(url, "shapes")
            tensor = kserve.InferInput("image", list(samples.shape), "FP32")
            tensor.set_data_from_numpy(samples, binary_data=binary)
            request = kserve.InferRequest("shapes", [tensor], request_id="7")
            response = await client.infer(url, request, model_name="shapes")
            assert isinstance(response, kserve.InferResponse)
            assert (response.model_name, response.id) == ("shapes", "7")
            probabilities = response.outputs[0].as_numpy().reshape(expected.shape)
            np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
            with pytest.raises(Exception, match="no model 'cars'"):
                await client.infer(url, kserve.InferRequest("cars", [tensor]), model_name="cars")
        finally:
            await client.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    directory = tmp_path_factory.mktemp("tasks")
    write_segmenter(directory / "models" / "segments")
    with served(directory / "models", directory / "log", "--allow-imports") as service:
        yield service


@pytest.mark.parametrize("binary", [True, False])
def test_triton_reads_masks_and_probabilities_of_a_segmentation(
    tasks: Service, binary: bool
) -> None:
    images = np.random.default_rng(0).random((40, 1, 6, 8)).astype(np.float32)
    bundle = read_bundle(tasks.models / "segments", allow_imports=True)
    expected = bundle.probabilities(torch.from_numpy(images)).numpy()
    inputs = [_input(triton, images, binary=binary)]
    wanted = [
        triton.InferRequestedOutput(name, binary_data=binary) for name in ("mask", "probabilities")
    ]
    with triton.InferenceServerClient(tasks.url.removeprefix("http://")) as client:
        usual = client.infer("segments", inputs)
        both = client.infer("segments", inputs, outputs=wanted)
    assert usual is not None
    assert both is not None
    assert usual.as_numpy("probabilities") is None
    for result in (usual, both):
        mask = result.as_numpy("mask")
        assert mask is not None
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected.argmax(1))
    probabilities = both.as_numpy("probabilities")
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
