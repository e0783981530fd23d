"""The models directory: what is in it, and what of it is loaded."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from service.errors import InvalidRequestError
from service.models.registry import IndexEntry, Registry
from service.routes.requests import read_body
from service.routes.responses import JsonResponse, PlainRoute, path_parameters, refusals

# The protocol's clients send any content type or none, which FastAPI would refuse.
router = APIRouter(prefix="/v2/repository", tags=["repository"], route_class=PlainRoute)
_BODY_LIMIT_BYTES = 1 << 16
_NAME: dict[str, Any] = {"parameters": path_parameters("name")}


def _body(properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


_REFUSALS = refusals(400, 401, 403, 404, 408, 413, 415)
_REFUSALS[400]["description"] = "the body is not of the protocol, or the model cannot be loaded"
_PARAMETERS = _body({"parameters": {"type": "object"}})


def _registry(request: Request) -> Registry[Any]:
    return request.app.state.registry


@router.post(
    "/index",
    response_model=list[IndexEntry],
    responses={status: _REFUSALS[status] for status in (400, 401, 408, 413, 415)},
    openapi_extra=_body({"ready": {"type": "boolean"}}),
)
async def index(request: Request) -> Response:
    """Return every bundle in the models directory, whether it is served, and if not, why not."""
    only_ready = (await _object(request)).get("ready", False)
    if type(only_ready) is not bool:
        raise InvalidRequestError(f"ready must be true or false, got {only_ready!r}")
    return JsonResponse(_registry(request).index(ready=only_ready))


@router.post("/models/{name}/load", responses=_REFUSALS, openapi_extra=_NAME | _PARAMETERS)
async def load(request: Request) -> Response:
    """Load a model that was unloaded or could not be loaded, in all workers."""
    parameters = (await _object(request)).get("parameters") or {}
    if parameters:
        raise InvalidRequestError(
            "models are loaded as they are in the models directory; send no parameters, "
            f"got {sorted(parameters)[:8] if isinstance(parameters, dict) else parameters!r}"
        )
    await _registry(request).load(request.path_params["name"])
    return JsonResponse({})


@router.post("/models/{name}/unload", responses=_REFUSALS, openapi_extra=_NAME | _PARAMETERS)
async def unload(request: Request) -> Response:
    """Stop serving a model in all workers, until it is loaded again or the service restarts."""
    await _object(request)
    await _registry(request).unload(request.path_params["name"])
    return JsonResponse({})


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, which may be empty."""
    settings = request.app.state.settings
    limit_bytes = min(_BODY_LIMIT_BYTES, settings.max_body_bytes)
    body = await read_body(request, limit_bytes=limit_bytes, timeout_s=settings.timeout_s)
    try:
        return msgspec.json.decode(body, type=dict[str, Any]) if body else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not a JSON object: {error}") from None
