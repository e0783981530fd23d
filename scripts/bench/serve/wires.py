"""How samples go to a server and probabilities come back, in each encoding."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Headers = Mapping[str, str]
ENCODINGS = ["raw", "json"]


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


def plain_wires(raw_path: str, json_path: str) -> dict[str, Wire]:
    """Return how a program is asked that takes nothing but the samples."""
    return {
        "raw": Wire(raw_path, _OCTETS, _raw, _from_raw),
        "json": Wire(json_path, _JSON, _plain_json, _from_plain_json),
    }


def base64_wires(path: str) -> dict[str, Wire]:
    """Return how MLServer is asked, which has no binary tensors over REST."""
    return {
        "raw": Wire(path, _JSON, _v2_base64, _from_v2_base64),
        "json": Wire(path, _JSON, _v2_json, _from_v2_json),
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
