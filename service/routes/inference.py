"""The models, what they take and give, and their answers."""

from fastapi import APIRouter, Request
from pydantic import ValidationError

from service.errors import BodyTooLargeError, InvalidRequestError
from service.inference import DataPlane, model_metadata
from service.schemas import (
    InferenceRequest,
    InferenceResponse,
    ModelList,
    ModelMetadata,
    ModelReady,
)

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
    body = await _read_body(request, request.app.state.settings.max_body_bytes)
    try:
        parsed = InferenceRequest.model_validate_json(body)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False)[:5]
        )
        raise InvalidRequestError(f"the body is not an inference request: {reasons}") from None
    return await _data_plane(request).infer(name, parsed)


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the raw body; clients of the protocol do not always state a content type."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise BodyTooLargeError(
                f"the body is larger than {limit_bytes} bytes; send fewer samples"
            )
    return bytes(body)
