"""How routes are called and how they answer: plainly, and errors as {"error": …}."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.schemas import ErrorBody

_REASONS = {
    400: "the request does not follow the protocol, or does not fit the model, or is not allowed",
    401: "no API key, or an unknown one",
    403: "the API key has not the scope that this needs",
    404: "no such model or job",
    408: "the body did not arrive in time",
    409: "the job's state does not allow this",
    413: "the body is too large",
    415: "the body is encoded in an unknown way, or is not of the type that it must be",
    429: "too much waits already; see Retry-After",
    500: "the model failed on this input",
    503: "no answer in time, or the store of jobs cannot be used; see Retry-After",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the API's description says of the errors that a route may answer with."""
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}


def path_parameters(*names: str) -> list[dict[str, Any]]:
    """Return what the API's description says of the parts of a plain route's path."""
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": f"the model's {name}",
            "schema": {"type": "string"},
        }
        for name in names
    ]


class BytesAnswer:
    """An answer of bytes with status 200, without what a `Response` has for cookies and the like.

    Args:
        body: the bytes.
        headers: names in lower case, and values, besides that of the length.
    """

    __slots__ = ("_body", "_headers")

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self._body = body
        self._headers = [*headers, (b"content-length", b"%d" % len(body))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        start = {"type": "http.response.start", "status": 200, "headers": self._headers}
        await send(start)
        await send({"type": "http.response.body", "body": self._body})


class PlainRoute(APIRoute):
    """A route that calls its endpoint with the request alone, and sends the response it returns.

    FastAPI's own solves dependencies and validates answers, which takes as long as a small model's
    forward. In the API's description it is like any other. It has to be among the app's own routes,
    as routers that an app includes go around it.
    """

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[ASGIApp]], **options: Any
    ) -> None:
        super().__init__(path, endpoint, **options)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = answer


class JsonResponse(Response):
    """JSON of what msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return msgspec.json.encode(content)


def error_answer(error: ServiceError) -> Response:
    """Return what tells a client of an error; the protocol's clients fail on any other form."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    # What a client sent may be quoted in it, at any length.
    body = ErrorBody(error=str(error)[:1000]).model_dump()
    return JsonResponse(body, error.status, headers)
