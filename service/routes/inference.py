"""The models, what they take and give, and their answers."""

import asyncio

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.errors import BodyTimeoutError, BodyTooLargeError, InvalidRequestError
from service.inference import DataPlane, model_metadata
from service.schemas import (
    InferenceRequest,
    InferenceResponse,
    ModelList,
    ModelMetadata,
    ModelReady,
)
from service.settings import Settings

router = APIRouter(prefix="/v2/models", tags=["models"])


def _data_plane(request: Request) -> DataPlane:
    return request.app.state.data_plane


@router.get("")
async def list_models(request: Request) -> ModelList:
    """Return every model's metadata."""
    registry = _data_plane(request).registry
    return ModelList(models=[model_metadata(registry.get(name)) for name in registry.names()])


@router.get("/{name}")
async def metadata(request: Request, name: str) -> ModelMetadata:
    """Return what a model takes and gives."""
    return model_metadata(_data_plane(request).registry.get(name))


@router.get("/{name}/ready")
async def model_ready(request: Request, name: str) -> ModelReady:
    """Answer 200 for a model that is loaded."""
    _data_plane(request).registry.get(name)
    return ModelReady(name=name, ready=True)


@router.post("/{name}/infer", response_model_exclude_none=True)
async def infer(request: Request, name: str) -> InferenceResponse:
    """Return a model's outputs for one sample or a batch of them, in JSON tensors."""
    _data_plane(request).registry.get(name)  # an unknown model costs no body
    body = await _read_body(request, request.app.state.settings)
    try:
        parsed = InferenceRequest.model_validate_json(body)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False)[:5]
        )
        raise InvalidRequestError(f"the body is not an inference request: {reasons}") from None
    return await _data_plane(request).infer(name, parsed)


async def _read_body(request: Request, settings: Settings) -> bytes:
    """Return the raw body; clients of the protocol do not always state a content type."""
    limit_bytes, body = settings.max_body_bytes, bytearray()
    try:
        async with asyncio.timeout(settings.timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise BodyTooLargeError(
                        f"the body is larger than {limit_bytes} bytes; send fewer samples"
                    )
    except TimeoutError:
        raise BodyTimeoutError(f"the body took longer than {settings.timeout_s:g} s") from None
    except ClientDisconnect:
        raise BodyTimeoutError("the client went away before the end of the body") from None
    return bytes(body)
