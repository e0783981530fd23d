"""The servers that scripts.bench.serve compares with, each as its documentation has it.

Each program below is a file of its own for the peer's own Python. All serve the same bundle by the
same call, `Bundle.probabilities`, and answer with the probabilities alone. Access logs are off, and
uvloop and httptools on, where a peer has them; JSON is read and written by orjson where a peer lets
the model's author do it. What else is chosen is what came out fastest here of what each peer
offers; `Peer.settings` says it in words, for the report.
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Headers = Mapping[str, str]

# What every program begins with.
_BEGINNING = """\
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from syncbn.bundle import read_bundle

THREADS, PORT = int(os.environ["BENCH_THREADS"]), int(os.environ["BENCH_PORT"])
MAX_BATCH_SIZE = 32


def load():
    torch.set_num_threads(THREADS)
    bundle = read_bundle(Path(os.environ["BENCH_BUNDLE"]))
    shape = (-1, *bundle.manifest.input.shape)

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def probabilities(samples):
        return bundle.probabilities(torch.from_numpy(samples).reshape(shape)).numpy()

    return probabilities


"""

_FASTAPI = """\
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

app = FastAPI()
model = load()


class Samples(BaseModel):
    samples: list[list[float]]


@app.get("/health")
async def health():
    return {}


@app.post("/raw")
async def raw(request: Request) -> Response:
    samples = np.frombuffer(await request.body(), np.float32)
    answer = await run_in_threadpool(model, samples)
    return Response(answer.tobytes(), media_type="application/octet-stream")


@app.post("/json")
def json(body: Samples):
    return {"probabilities": model(np.array(body.samples, np.float32)).tolist()}


uvicorn.run(app, host="127.0.0.1", port=PORT, access_log=False, log_level="warning")
"""

_FASTAPI_INLINE = """\
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
model = load()


@app.get("/health")
async def health():
    return {}


@app.post("/raw")
async def raw(request: Request) -> Response:
    samples = np.frombuffer(await request.body(), np.float32)
    return Response(model(samples).tobytes(), media_type="application/octet-stream")


@app.post("/json")
async def json(request: Request) -> Response:
    samples = np.array(orjson.loads(await request.body())["samples"], np.float32)
    answer = orjson.dumps({"probabilities": model(samples).tolist()})
    return Response(answer, media_type="application/json")


uvicorn.run(app, host="127.0.0.1", port=PORT, access_log=False, log_level="warning")
"""

_LITSERVE = """\
from typing import Annotated, Any

import litserve
import orjson
from fastapi import Depends, Request, Response


async def read(request: Request) -> Any:
    body = await request.body()
    if request.headers["content-type"] == "application/json":
        return True, np.array(orjson.loads(body)["samples"], np.float32)
    return False, np.frombuffer(body, np.float32)


class Served(litserve.LitAPI):
    def setup(self, device):
        self.model = load()

    def decode_request(self, request: Annotated[Any, Depends(read)], context):
        context["json"], samples = request
        return samples

    def batch(self, inputs):
        return np.stack([np.ravel(samples) for samples in inputs])

    def predict(self, x):
        return self.model(x)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output, context) -> Response:
        if context["json"]:
            answer = orjson.dumps({"probabilities": [output.tolist()]})
            return Response(answer, media_type="application/json")
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Served(max_batch_size=MAX_BATCH_SIZE, batch_timeout=0)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=2,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
"""

_BENTOML = """\
from typing import Annotated

import bentoml
from bentoml.validators import DType
from starlette.responses import Response


class RawSamples(bentoml.IODescriptor):
    samples: Annotated[np.ndarray, DType("float32")]

    @classmethod
    def model_validate_json(cls, json_data, **others):
        samples = np.frombuffer(json_data, np.float32)
        return cls.model_construct(samples=samples.reshape(1, -1))


class RawProbabilities(bentoml.IODescriptor):
    @classmethod
    async def to_http_response(cls, obj, serde):
        return Response(obj.tobytes(), media_type="application/octet-stream")


class Probabilities(bentoml.IODescriptor):
    probabilities: Annotated[np.ndarray, DType("float32")]


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Served:
    def __init__(self):
        self.model = load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE)
    def json(
        self, samples: Annotated[np.ndarray, DType("float32")]
    ) -> Annotated[np.ndarray, DType("float32")]:
        return self.model(np.ascontiguousarray(samples))

    @bentoml.api(
        batchable=True,
        max_batch_size=MAX_BATCH_SIZE,
        input_spec=RawSamples,
        output_spec=RawProbabilities,
    )
    def raw(self, samples: np.ndarray) -> np.ndarray:
        return self.model(np.ascontiguousarray(samples))
"""

_MLSERVER = """\
import base64

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse, ResponseOutput


class Served(MLModel):
    async def load(self):
        self.predict_samples = load()
        return True

    async def predict(self, payload):
        tensor = payload.inputs[0]
        if tensor.datatype == "FP32":
            samples = np.array(tensor.data.root, np.float32)
            output = NumpyCodec.encode_output("probabilities", self.predict_samples(samples))
        else:
            samples = np.frombuffer(b"".join(map(base64.b64decode, tensor.data.root)), np.float32)
            answers = self.predict_samples(samples)
            output = ResponseOutput(
                name="probabilities",
                datatype="BYTES",
                shape=[len(answers), 1],
                data=[base64.b64encode(row.tobytes()).decode() for row in answers],
            )
        return InferenceResponse(model_name=self.name, outputs=[output])
"""


@dataclass(frozen=True)
class Wire:
    """How samples go to a server and probabilities come back, in one encoding.

    Attributes:
        path: to POST to.
        headers: what to send besides Host and Content-Length.
        encode: makes a body of samples, and the headers that go with it.
        decode: finds the probabilities in an answer's headers (in lower case) and body.
    """

    path: str
    headers: Headers
    encode: Callable[[Array], tuple[bytes, Headers]]
    decode: Callable[[Headers, bytes], Array]


def _raw(samples: Array) -> tuple[bytes, Headers]:
    return samples.tobytes(), {}


def _from_raw(headers: Headers, body: bytes) -> Array:
    return np.frombuffer(body, np.float32)


def _plain_json(samples: Array) -> tuple[bytes, Headers]:
    return json.dumps({"samples": samples.reshape(len(samples), -1).tolist()}).encode(), {}


def _from_plain_json(headers: Headers, body: bytes) -> Array:
    answer = json.loads(body)
    return np.array(answer["probabilities"] if isinstance(answer, dict) else answer, np.float32)


def _tensor(samples: Array, **others: Any) -> dict[str, Any]:
    return {"name": "image", "shape": list(samples.shape), "datatype": "FP32", **others}


def _v2_json(samples: Array) -> tuple[bytes, Headers]:
    tensor = _tensor(samples, data=samples.ravel().tolist())
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "probabilities"}]}).encode(), {}


def _from_v2_json(headers: Headers, body: bytes) -> Array:
    return np.array(json.loads(body)["outputs"][0]["data"], np.float32)


def _v2_base64(samples: Array) -> tuple[bytes, Headers]:
    data = [base64.b64encode(sample.tobytes()).decode() for sample in samples]
    tensor = {"name": "image", "shape": [len(samples), 1], "datatype": "BYTES", "data": data}
    return json.dumps({"inputs": [tensor]}).encode(), {}


def _from_v2_base64(headers: Headers, body: bytes) -> Array:
    data = json.loads(body)["outputs"][0]["data"]
    return np.frombuffer(b"".join(map(base64.b64decode, data)), np.float32)


def _v2_binary(samples: Array) -> tuple[bytes, Headers]:
    tensor = _tensor(samples, parameters={"binary_data_size": samples.nbytes})
    output = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    return head + samples.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def _from_v2_binary(headers: Headers, body: bytes) -> Array:
    return np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32)


_OCTETS = {"Content-Type": "application/octet-stream"}
_JSON = {"Content-Type": "application/json"}
_PLAIN = {
    "raw": Wire("/raw", _OCTETS, _raw, _from_raw),
    "json": Wire("/json", _JSON, _plain_json, _from_plain_json),
}


def protocol_wires(model: str, headers: Headers) -> dict[str, Wire]:
    """Return how the Open Inference Protocol is spoken: as tritonclient sends it, and in JSON.

    Args:
        model: its name at the server.
        headers: what every request needs, a key for one.
    """
    path = f"/v2/models/{model}/infer"
    return {
        "raw": Wire(path, {**headers, **_OCTETS}, _v2_binary, _from_v2_binary),
        "json": Wire(path, {**headers, **_JSON}, _v2_json, _from_v2_json),
    }


@dataclass(frozen=True)
class Peer:
    """A server that others use.

    Attributes:
        name: for people.
        package: what pip calls it; those of the same package share an environment.
        settings: what was chosen for it, in words.
        requirements: what pip installs for it besides torch and what a bundle needs.
        program: the file server.py.
        command: what starts it in a directory with its files; the first is one of its Python's
            programs. PORT_0, PORT_1 and PORT_2 stand for free ports, of which the first is asked,
            and DIRECTORY for the directory; here, in files and in the environment.
        ready: the path that answers 200 once it can be asked.
        wires: how it is asked, by encoding.
        files: what else it needs in its directory, by name.
        environment: variables of its own.
        wait_s: what WAIT_S stands for, by model.
    """

    name: str
    package: str
    settings: str
    requirements: tuple[str, ...]
    program: str
    command: tuple[str, ...]
    ready: str
    wires: Mapping[str, Wire]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Headers = field(default_factory=dict)
    wait_s: Mapping[str, float] = field(default_factory=dict)


_FASTAPI_REQUIREMENTS = ("fastapi", "uvicorn", "uvloop", "httptools", "orjson")

PEERS = {
    "fastapi": Peer(
        name="FastAPI",
        package="fastapi",
        settings="no batching; the model in a thread of its pool, as its documentation has it for "
        "what blocks; JSON by a Pydantic model",
        requirements=_FASTAPI_REQUIREMENTS,
        program=_BEGINNING + _FASTAPI,
        command=("python", "server.py"),
        ready="/health",
        wires=_PLAIN,
    ),
    "fastapi-inline": Peer(
        name="FastAPI inline",
        package="fastapi",
        settings="no batching; async functions that call the model themselves, so that nothing "
        "else is heard or answered meanwhile; JSON by orjson, unchecked",
        requirements=_FASTAPI_REQUIREMENTS,
        program=_BEGINNING + _FASTAPI_INLINE,
        command=("python", "server.py"),
        ready="/health",
        wires=_PLAIN,
    ),
    "litserve": Peer(
        name="LitServe",
        package="litserve",
        settings="max_batch_size 32, batch_timeout 0 (it looks for requests all the time), "
        "fast_queue, one worker, two API servers, which read raw bodies or JSON by orjson",
        requirements=("litserve", "uvloop", "httptools", "orjson"),
        program=_BEGINNING + _LITSERVE,
        command=("python", "server.py"),
        ready="/health",
        wires={
            "raw": Wire("/predict", _OCTETS, _raw, _from_raw),
            "json": Wire("/predict", _JSON, _plain_json, _from_plain_json),
        },
    ),
    "bentoml": Peer(
        name="BentoML",
        package="bentoml",
        settings="batchable functions, max_batch_size 32, waits that adapt, one worker; raw bodies "
        "by an input_spec of its own",
        requirements=("bentoml", "uvloop", "httptools", "orjson"),
        program=_BEGINNING + _BENTOML,
        command=("bentoml", "serve", "server:Served", "--host", "127.0.0.1", "--port", "PORT_0"),
        ready="/readyz",
        wires=_PLAIN,
        environment={"BENTOML_HOME": "DIRECTORY", "BENTOML_DO_NOT_TRACK": "True"},
    ),
    "mlserver": Peer(
        name="MLServer",
        package="mlserver",
        settings="max_batch_size 32, max_batch_time 0.3 ms for the cnn and 3 ms for ResNet-18, "
        "parallel_workers 0, no gzip; having no binary tensors over REST, raw is base64 in BYTES",
        requirements=("mlserver", "uvloop", "httptools", "orjson"),
        program=_BEGINNING + _MLSERVER,
        command=("mlserver", "start", "."),
        ready="/v2/models/served/ready",
        wires={
            "raw": Wire("/v2/models/served/infer", _JSON, _v2_base64, _from_v2_base64),
            "json": Wire("/v2/models/served/infer", _JSON, _v2_json, _from_v2_json),
        },
        files={
            "settings.json": {
                "host": "127.0.0.1",
                "http_port": "PORT_0",
                "grpc_port": "PORT_1",
                "metrics_port": "PORT_2",
                "debug": False,
                "parallel_workers": 0,
                "gzip_enabled": False,
            },
            "model-settings.json": {
                "name": "served",
                "implementation": "server.Served",
                "max_batch_size": 32,
                "max_batch_time": "WAIT_S",
            },
        },
        wait_s={"tiny": 0.0003, "resnet18": 0.003},
    ),
}
