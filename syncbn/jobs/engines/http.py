"""JSON over HTTP with a deadline, as little as an engine needs, from the standard library."""

import http.client
import json
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from syncbn.errors import JobError

_LIMIT_BYTES = 1 << 28


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP.
        content: the JSON, or the text if it is none.
    """

    status: int
    content: Any


class Http(Protocol):
    """Sends requests."""

    def __call__(self, method: str, path: str, body: Any = None) -> Answer:
        """Send one request and return the answer, whatever its status.

        Raises:
            OSError: there was none in time: what was asked for may have been done.
        """
        ...


class HttpServer:
    """A server that answers in JSON.

    Args:
        url: http:// or https://, host and port.
        token: which it asks for; empty: none.
        timeout_s: how long it may take to say anything.

    Raises:
        JobError: the address is none.
    """

    def __init__(self, url: str, token: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise JobError(f"{url}: must be as http://HOST:PORT, or https")
        secure = parts.scheme == "https"
        self._connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname, port
        self._path = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request on a connection of its own."""
        headers, data = self._headers, None
        if body is not None:
            headers, data = {**headers, "Content-Type": "application/json"}, json.dumps(body)
        connection = self._connect(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            content = response.read(_LIMIT_BYTES)
        except http.client.HTTPException as error:
            raise ConnectionError(f"not an answer of HTTP: {error!r}") from error
        finally:
            connection.close()
        try:
            return Answer(response.status, json.loads(content))
        except ValueError:
            return Answer(response.status, content.decode(errors="replace"))
