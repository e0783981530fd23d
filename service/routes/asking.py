"""What the routes of jobs have of a request: who asks, and the control plane."""

from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request

from service.auth import Identity
from service.errors import InvalidRequestError
from service.jobs.control_plane import ControlPlane
from service.routes.requests import read_body

BODY_LIMIT_BYTES = 1 << 20


def _plane(request: Request) -> ControlPlane:
    return request.app.state.control_plane


def _identity(request: Request) -> Identity:
    return request.scope["identity"]


Plane = Annotated[ControlPlane, Depends(_plane)]
Asker = Annotated[Identity, Depends(_identity)]


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, which may be empty.

    Raises:
        InvalidRequestError: it holds something else.
        ServiceError: as `read_body`.
    """
    settings = request.app.state.settings
    limit_bytes = min(BODY_LIMIT_BYTES, settings.max_body_bytes)
    body = await read_body(request, limit_bytes=limit_bytes, timeout_s=settings.timeout_s)
    try:
        return msgspec.json.decode(body, type=dict[str, Any]) if body else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not a JSON object: {error}") from None
