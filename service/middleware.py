"""What every HTTP request passes: its id, key and size checked, its answer secured and recorded."""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import JOBS_BELOW, Doorkeeper, is_open, scope_for
from service.auth import ANYBODY, Identity, Keys
from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    ForbiddenError,
    InvalidRequestError,
    KeyMissingError,
    ServiceError,
)
from service.logs import request_id_var
from service.metrics import Metrics
from service.routes.responses import error_answer

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SECURITY = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
_NOT_STORED = (b"cache-control", b"no-store")

WriteLine = Callable[..., None]


class Gate:
    """An ASGI middleware that lets a request in, and writes down what became of it.

    Args:
        app: what answers.
        keys: who may ask; None: everybody.
        doorkeeper: keeps out what pages of others made a browser send.
        metrics: count and time every request.
        max_body_bytes: of a request.
        write_line: writes a request's line to the log.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None,
        doorkeeper: Doorkeeper,
        metrics: Metrics,
        max_body_bytes: int,
        write_line: WriteLine,
    ) -> None:
        self._app = app
        self._keys = keys
        self._doorkeeper = doorkeeper
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._write_line = write_line
        self._id_prefix = secrets.token_hex(4).encode()  # tells processes apart
        self._numbers = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.perf_counter()
        headers = scope["headers_by_name"] = dict[bytes, bytes](scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not request_id or not _REQUEST_ID.fullmatch(request_id):
            request_id = b"%s-%x" % (self._id_prefix, next(self._numbers))
        token = request_id_var.set(request_id.decode())
        status = 0

        async def send_secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given: list[tuple[bytes, bytes]] = message.get("headers", [])
                message["headers"] = [*given, *_SECURITY, (b"x-request-id", request_id)]
                for name, _ in given:
                    if name == b"cache-control":
                        break
                else:
                    message["headers"].append(_NOT_STORED)
            await send(message)

        try:
            try:
                self._let_in(scope, headers)
                if b"content-length" not in headers:
                    receive = self._limited(receive)
                await self._app(scope, receive, send_secured)
            except ClientGoneError as error:
                status = error.status  # nobody is there to be told
            except ServiceError as error:
                await error_answer(error)(scope, receive, send_secured)
            except Exception as error:
                log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
                if not status:
                    await error_answer(ServiceError("internal error; the server's log says more"))(
                        scope, receive, send_secured
                    )
        finally:
            seconds = time.perf_counter() - start_s
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.http_request(route, scope["method"], status, seconds)
            self._write_line(
                request_id=request_id.decode(),
                method=scope["method"],
                path=scope["path"],
                route=route,
                status=status,
                seconds=seconds,
                client=_address(scope.get("client")),
                model=scope.get("path_params", {}).get("name"),
            )
            request_id_var.reset(token)

    def _let_in(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Check a request's key, origin and size, before anything of its body is read.

        Raises:
            ServiceError: it may not come in.
        """
        path, method = scope["path"], scope["method"]
        scope["identity"] = ANYBODY
        if self._keys is not None and not is_open(path):
            scope["identity"] = self._identify(self._keys, method, path, headers)
        if path.startswith(JOBS_BELOW):
            self._doorkeeper.check(method, headers)
        length = headers.get(b"content-length")
        if length is None:
            return
        if not length.isdigit():
            raise InvalidRequestError(f"Content-Length must be a number, got {length[:20]!r}")
        if int(length[:20]) > self._max_body_bytes:
            raise self._too_large()

    @staticmethod
    def _identify(keys: Keys, method: str, path: str, headers: dict[bytes, bytes]) -> Identity:
        identity = keys.identify(headers.get(b"authorization"), headers.get(b"x-api-key"))
        if identity is None:
            raise KeyMissingError(
                "an API key is needed: send it as Authorization: Bearer KEY, or as X-API-Key"
                if b"authorization" not in headers and b"x-api-key" not in headers
                else "this API key is not known"
            )
        needed = scope_for(method, path)
        if needed is not None and not identity.may(needed):
            raise ForbiddenError(
                f"this needs an API key with the scope {needed}; yours has "
                f"{', '.join(sorted(identity.scopes))}"
            )
        return identity

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` for a body of unknown length, which ends where it becomes too large."""
        left_bytes = self._max_body_bytes

        async def receive_limited() -> Message:
            nonlocal left_bytes
            message = await receive()
            left_bytes -= len(message.get("body", b""))
            if left_bytes < 0:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._max_body_bytes} bytes; send fewer samples"
        )


def _address(client: Any) -> str | None:
    return None if client is None else f"{client[0]}:{client[1]}"
