"""The programs of the peers' servers, each as its documentation has it.

Each is written to a file for the peer's own Python. All serve the same bundle by the same call,
`Bundle.probabilities`, and answer with the probabilities alone. Access logs are off, and uvloop and
httptools on, where a peer has them; JSON is read and written by orjson where a peer lets the
model's author do it.
"""

# What every program begins with.
BEGINNING = """\
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

FASTAPI = """\
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

FASTAPI_INLINE = """\
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

LITSERVE = """\
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

BENTOML = """\
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

MLSERVER = """\
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
