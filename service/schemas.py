"""The JSON bodies of the Open Inference Protocol, version 2.

Unknown keys are ignored, as clients add their own.
Source: https://github.com/kserve/open-inference-protocol, inference_rest.yaml.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class _Body(BaseModel):
    # The protocol's own `model_name` starts with what pydantic reserves.
    model_config = ConfigDict(protected_namespaces=())


Dimension = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]


class RequestInput(_Body):
    """A tensor sent by a client; data in row-major order, flat or nested."""

    name: str
    shape: Annotated[list[Dimension], Field(max_length=8)]
    datatype: str
    data: list[Any]


class RequestOutput(_Body):
    """A tensor that a client asks for."""

    name: str


class InferenceRequest(_Body):
    """The body of /v2/models/{name}/infer; without outputs, all are meant."""

    id: str | None = None
    inputs: list[RequestInput]
    outputs: list[RequestOutput] | None = None


class ResponseOutput(_Body):
    """A tensor sent to a client; data flat, in row-major order."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | list[str]


class InferenceResponse(_Body):
    """The answer of /v2/models/{name}/infer."""

    model_name: str
    id: str | None = None
    outputs: list[ResponseOutput]


class TensorMetadata(_Body):
    """What a model takes or gives; -1 is the number of samples."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Body):
    """The answer of /v2/models/{name}."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


class ModelList(_Body):
    """The answer of /v2/models, which the protocol does not have."""

    models: list[ModelMetadata]


class ModelReady(_Body):
    """The answer of /v2/models/{name}/ready."""

    name: str
    ready: bool


class ServerMetadata(_Body):
    """The answer of /v2."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(_Body):
    """The answer of /v2/health/live."""

    live: bool


class ServerReady(_Body):
    """The answer of /v2/health/ready."""

    ready: bool


class ErrorBody(_Body):
    """The answer to whatever failed."""

    error: str
