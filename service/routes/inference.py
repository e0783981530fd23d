"""The models: what they take and give, and their answers."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from service.errors import InvalidRequestError
from service.models.data_plane import DataPlane
from service.models.tensors import InferenceRequest, InferenceResponse
from service.routes.requests import compressed, has_left, header, read_body
from service.routes.responses import BytesAnswer, PlainRoute, path_parameters, refusals
from service.schemas import (
    ModelConfig,
    ModelDrift,
    ModelList,
    ModelMetadata,
    ModelReady,
    StatisticsList,
)
from service.settings import Settings

JSON_BYTES = "Inference-Header-Content-Length"
_JSON_BYTES = JSON_BYTES.lower().encode()
_WORTH_COMPRESSING_BYTES = 1024
_LONG_TO_COMPRESS_BYTES = 1 << 20  # others wait for the event loop meanwhile
_REF = "#/components/schemas/{name}"
_NAME = "/v2/models/{name}"
_VERSION = _NAME + "/versions/{version}"

_, INFERENCE_SCHEMAS = msgspec.json.schema_components(
    (InferenceRequest, InferenceResponse), ref_template=_REF
)
REFUSALS = refusals(400, 401, 404, 408, 413, 415, 429, 500, 503)
_NOT_FOUND = refusals(400, 401, 404)
_TENSORS = {"type": "string", "format": "binary"}


def _infer_description(*path: str) -> dict[str, Any]:
    """Return what the API's description says of inference, which FastAPI cannot see."""

    def content(name: str) -> dict[str, Any]:
        return {
            "application/json": {"schema": {"$ref": _REF.format(name=name)}},
            "application/octet-stream": {"schema": _TENSORS},
        }

    json_bytes = "how many bytes of the body are JSON, where binary tensors follow it"
    length = {"name": JSON_BYTES, "in": "header", "required": False, "description": json_bytes}
    return {
        "parameters": [
            *path_parameters(*path),
            length | {"schema": {"type": "integer", "minimum": 0}},
        ],
        "requestBody": {"required": True, "content": content("InferenceRequest")},
        "responses": {
            "200": {
                "description": "the outputs; binary where that was asked for",
                "content": content("InferenceResponse"),
                "headers": {JSON_BYTES: {"schema": {"type": "integer"}, "description": json_bytes}},
            }
        },
    }


# Inference comes first, as routes are tried in their order.
plain_router = APIRouter(tags=["models"], route_class=PlainRoute)


@plain_router.post(
    _VERSION + "/infer",
    response_model=None,
    responses=REFUSALS,
    openapi_extra=_infer_description("name", "version"),
)
@plain_router.post(
    _NAME + "/infer",
    response_model=None,
    responses=REFUSALS,
    openapi_extra=_infer_description("name"),
)
async def infer(request: Request) -> BytesAnswer:
    """Return a model's outputs for one sample or a batch of them.

    Tensors are JSON, or binary behind the JSON, whose length the header then says. A header of 0
    means that the whole body is one sample in binary, and so will the answer be.
    """
    settings, data_plane = _settings(request), _data_plane(request)
    path = request.path_params
    name, version = path["name"], path.get("version")
    data_plane.registry.get(name, version)  # an unknown model costs no body
    json_bytes: int | None = None
    if _JSON_BYTES in request.scope["headers_by_name"]:
        length = header(request, _JSON_BYTES)
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            raise InvalidRequestError(
                f"{JSON_BYTES} must be a number of bytes, got {length[:40]!r}"
            )
        json_bytes = int(length)
    body = await read_body(
        request, limit_bytes=settings.max_body_bytes, timeout_s=settings.timeout_s
    )
    receive = request.receive
    answer, json_bytes = await data_plane.infer(
        name, version, body, json_bytes, lambda: has_left(receive)
    )
    headers = [(b"content-type", b"application/json")]
    if json_bytes is not None:
        headers = [
            (b"content-type", b"application/octet-stream"),
            (_JSON_BYTES, b"%d" % json_bytes),
        ]
    if len(answer) >= _WORTH_COMPRESSING_BYTES:
        accepted = header(request, b"accept-encoding")
        if accepted and len(answer) >= _LONG_TO_COMPRESS_BYTES:
            answer, encoding = await asyncio.to_thread(compressed, answer, accepted)
        else:
            answer, encoding = compressed(answer, accepted)
        if encoding is not None:
            headers.append((b"content-encoding", encoding.encode()))
        headers.append((b"vary", b"Accept-Encoding"))
    return BytesAnswer(answer, headers)


router = APIRouter(tags=["models"])


def _data_plane(request: Request) -> DataPlane:
    return request.app.state.data_plane


def _settings(request: Request) -> Settings:
    return request.app.state.settings


@router.get("/v2/models")
async def list_models(request: Request) -> ModelList:
    """Return every model's metadata."""
    data_plane = _data_plane(request)
    return ModelList(models=[data_plane.metadata(name) for name in data_plane.registry.names()])


@router.get("/v2/models/stats")
async def all_statistics(request: Request) -> StatisticsList:
    """Return how often each model was asked, and how long it took."""
    return _data_plane(request).statistics()


@router.get(_VERSION, responses=_NOT_FOUND)
@router.get(_NAME, responses=_NOT_FOUND)
async def metadata(request: Request, name: str, version: str | None = None) -> ModelMetadata:
    """Return what a model takes and gives."""
    return _data_plane(request).metadata(name, version)


@router.get(_VERSION + "/ready", responses=_NOT_FOUND)
@router.get(_NAME + "/ready", responses=_NOT_FOUND)
async def model_ready(request: Request, name: str, version: str | None = None) -> ModelReady:
    """Answer 200 for a model that is loaded."""
    _data_plane(request).registry.get(name, version)
    return ModelReady(name=name, ready=True)


@router.get(_VERSION + "/config", responses=_NOT_FOUND)
@router.get(_NAME + "/config", responses=_NOT_FOUND)
async def config(request: Request, name: str, version: str | None = None) -> ModelConfig:
    """Return a model's configuration, as Triton's clients read it."""
    return _data_plane(request).config(name, version)


@router.get(_VERSION + "/stats", responses=_NOT_FOUND)
@router.get(_NAME + "/stats", responses=_NOT_FOUND)
async def statistics(request: Request, name: str, version: str | None = None) -> StatisticsList:
    """Return how often a model was asked, and how long it took."""
    return _data_plane(request).statistics(name, version)


@router.get(_VERSION + "/drift", responses=_NOT_FOUND)
@router.get(_NAME + "/drift", responses=_NOT_FOUND)
async def drift(request: Request, name: str, version: str | None = None) -> ModelDrift:
    """Return how far recent inputs are from what the model was trained with.

    Distances are in standard deviations of training: 0 means as in training.
    """
    return _data_plane(request).drift(name, version)
