"""Which scope a request needs, and whether a page of somebody else may have sent it."""

import ipaddress
import socket
from collections.abc import Mapping, Sequence

from service.auth import Scope
from service.errors import ForbiddenError, MediaTypeError

# What needs no key: whether the service is well, and the pages, which ask for one themselves.
_OPEN = {"/", "/jobs", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
_OPEN_BELOW = "/static/"
_ADMIN_BELOW = "/v2/repository/models/"
_INFER_BELOW = ("/v2/", "/predict/")
JOBS_BELOW = "/v1/"
_READING = {"GET", "HEAD", "OPTIONS"}


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def scope_for(method: str, path: str) -> Scope | None:
    """Return what a key must allow for a request; None: any key will do."""
    if path.startswith(_ADMIN_BELOW):
        return Scope.ADMIN
    if path.startswith(JOBS_BELOW):
        return Scope.JOBS_READ if method in _READING else Scope.JOBS_WRITE
    return Scope.INFER if path.startswith(_INFER_BELOW) else None


class Doorkeeper:
    """Keeps requests about jobs out that a page of another origin made a browser send.

    On a loopback address nobody needs a key, so whatever a browser on this machine can be made to
    send would count. A page may send requests to anywhere, though not as JSON; and under a name
    that its owner lets point to this machine, it may also read the answers.

    Args:
        host: what the service listens on.
        allowed_hosts: further names that it is reached by.
        origins: whose pages may use it, such as https://a.example.
    """

    def __init__(self, host: str, allowed_hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._allowed = {name.lower() for name in allowed_hosts}
        self._is_loopback = is_loopback(_address_of(host))
        if self._is_loopback:
            self._allowed.add(host.lower())
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Let a request about jobs pass.

        Raises:
            ForbiddenError: its Host or Origin is not known.
            MediaTypeError: it changes something and does not say that it is JSON.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._knows(host):
            raise ForbiddenError(
                f"this service is not known as {host[:80]!r}; if it should be, start it with "
                "--allowed-hosts"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and origin not in self._origins:
            raise ForbiddenError(
                f"pages of {origin[:80]!r} may not use this service; if they should, start it with "
                "--cors-origins"
            )
        if method in _READING:
            return
        media_type = headers.get(b"content-type", b"").decode("latin-1")
        if media_type.partition(";")[0].strip().lower() != "application/json":
            raise MediaTypeError(
                "requests that change jobs need Content-Type: application/json, got "
                f"{media_type[:80]!r}"
            )

    def _knows(self, host: str) -> bool:
        name = _without_port(host)
        if name in self._allowed or host in self._allowed:
            return True
        if self._is_loopback:
            return is_loopback(name)
        return not self._allowed


def is_loopback(name: str) -> bool:
    """Return whether a name or address means this machine, wherever it is looked up."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _address_of(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:  # nothing can be listened on there either
        return host


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
