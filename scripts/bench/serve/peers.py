"""The servers that the service is compared with: what each needs, and how it is set.

What is chosen is what came out fastest here of what each peer offers; `Peer.settings` says it in
words, for the report.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.serve.programs import (
    BEGINNING,
    BENTOML,
    FASTAPI,
    FASTAPI_INLINE,
    LITSERVE,
    MLSERVER,
)
from scripts.bench.serve.wires import Headers, Wire, base64_wires, plain_wires


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
        program=BEGINNING + FASTAPI,
        command=("python", "server.py"),
        ready="/health",
        wires=plain_wires("/raw", "/json"),
    ),
    "fastapi-inline": Peer(
        name="FastAPI inline",
        package="fastapi",
        settings="no batching; async functions that call the model themselves, so that nothing "
        "else is heard or answered meanwhile; JSON by orjson, unchecked",
        requirements=_FASTAPI_REQUIREMENTS,
        program=BEGINNING + FASTAPI_INLINE,
        command=("python", "server.py"),
        ready="/health",
        wires=plain_wires("/raw", "/json"),
    ),
    "litserve": Peer(
        name="LitServe",
        package="litserve",
        settings="max_batch_size 32, batch_timeout 0 (it looks for requests all the time), "
        "fast_queue, one worker, two API servers, which read raw bodies or JSON by orjson",
        requirements=("litserve", "uvloop", "httptools", "orjson"),
        program=BEGINNING + LITSERVE,
        command=("python", "server.py"),
        ready="/health",
        wires=plain_wires("/predict", "/predict"),
    ),
    "bentoml": Peer(
        name="BentoML",
        package="bentoml",
        settings="batchable functions, max_batch_size 32, waits that adapt, one worker; raw bodies "
        "by an input_spec of its own",
        requirements=("bentoml", "uvloop", "httptools", "orjson"),
        program=BEGINNING + BENTOML,
        command=("bentoml", "serve", "server:Served", "--host", "127.0.0.1", "--port", "PORT_0"),
        ready="/readyz",
        wires=plain_wires("/raw", "/json"),
        environment={"BENTOML_HOME": "DIRECTORY", "BENTOML_DO_NOT_TRACK": "True"},
    ),
    "mlserver": Peer(
        name="MLServer",
        package="mlserver",
        settings="max_batch_size 32, max_batch_time 0.3 ms for the cnn and 3 ms for ResNet-18, "
        "parallel_workers 0, no gzip; having no binary tensors over REST, raw is base64 in BYTES",
        requirements=("mlserver", "uvloop", "httptools", "orjson"),
        program=BEGINNING + MLSERVER,
        command=("mlserver", "start", "."),
        ready="/v2/models/served/ready",
        wires=base64_wires("/v2/models/served/infer"),
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

OURS = "ours"
NAMES = {OURS: "syncbn", **{key: peer.name for key, peer in PEERS.items()}}
