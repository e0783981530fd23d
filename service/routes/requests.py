"""What a request brings: its body within limits, and whether its sender still waits."""

import asyncio
import zlib
from collections.abc import Coroutine
from typing import Any, cast

from fastapi import Request
from starlette.types import Message, Receive

from service.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    EncodingError,
    InvalidRequestError,
)

# Of zlib: where the stream's form is told, and with which level ours is compressed.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_LEVEL = 1


async def read_body(request: Request, *, limit_bytes: int, timeout_s: float) -> bytes:
    """Return the raw body, decompressed; clients of the protocol do not always state its type.

    Args:
        request: whose body is read.
        limit_bytes: of the body, as it is sent and after decompression.
        timeout_s: for all of it to arrive.

    Raises:
        BodyTimeoutError: it did not arrive in time.
        BodyTooLargeError: it is larger.
        EncodingError: it is compressed in an unknown way.
        InvalidRequestError: it cannot be decompressed.
    """
    chunks: list[bytes] = []
    length_bytes = 0
    encoding = header(request, b"content-encoding").strip().lower()
    if encoding == "identity":
        encoding = ""
    first = _at_hand(request.receive)
    if first is not None and first["type"] == "http.request" and not first.get("more_body", False):
        body = first.get("body", b"")  # the usual case, without the cost of a deadline
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        return body if not encoding else _decompressed(body, encoding, limit_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = first or await request.receive()
                first = None
                if message["type"] == "http.disconnect":
                    raise BodyTimeoutError("the client went away before the end of the body")
                chunks.append(message.get("body", b""))
                length_bytes += len(chunks[-1])
                if length_bytes > limit_bytes:
                    raise _too_large(limit_bytes)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise BodyTimeoutError(f"the body took longer than {timeout_s:g} s") from None
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return body if not encoding else _decompressed(body, encoding, limit_bytes)


def _decompressed(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    if encoding not in _WINDOW_BITS:
        raise EncodingError(
            f"Content-Encoding {encoding[:40]!r} is not known; use gzip, deflate or none"
        )
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        whole = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body is not {encoding}: {error}") from None
    if len(whole) > limit_bytes:
        raise _too_large(limit_bytes, f" without {encoding}")
    if not stream.eof or stream.unused_data:
        raise InvalidRequestError(f"the body is not one whole {encoding} stream")
    return whole


def _too_large(limit_bytes: int, form: str = "") -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limit_bytes} bytes{form}; send less")


def compressed(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Return a body in the first encoding that is accepted, and that encoding; None: as it was.

    Args:
        body: any bytes.
        accepted: the header Accept-Encoding.
    """
    for choice in accepted.lower().split(","):
        encoding, _, quality = choice.partition(";")
        encoding = encoding.strip()
        if encoding in _WINDOW_BITS and quality.replace(" ", "") not in ("q=0", "q=0.0"):
            stream = zlib.compressobj(_LEVEL, wbits=_WINDOW_BITS[encoding])
            return stream.compress(body) + stream.flush(), encoding
    return body, None


def header(request: Request, name: bytes) -> str:
    """Return a header by its name in lower case; empty where there is none.

    The middleware has them in a dict already, while `request.headers` looks through a list.
    """
    return request.scope["headers_by_name"].get(name, b"").decode("latin-1")


def has_left(receive: Receive) -> bool:
    """Return whether the client of a request whose body was read has closed the connection."""
    message = _at_hand(receive)
    return message is not None and message["type"] == "http.disconnect"


def _at_hand(receive: Receive) -> Message | None:
    """Return the next message if it need not be waited for, which one step of `receive` shows."""
    waiting = cast(Coroutine[Any, Any, Any], receive())
    try:
        waiting.send(None)
    except StopIteration as stop:
        return stop.value
    waiting.close()
    return None
