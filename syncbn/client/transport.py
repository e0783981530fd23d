"""Between what a client means and httpx2: what both clients do alike with it."""

import ssl
from typing import Any

import httpx2

from syncbn.client.calls import Answer, Call
from syncbn.client.server import Server
from syncbn.client.steps import Failure

BROKEN_OFF = Failure("the stream of events ended")


def client_options(server: Server) -> dict[str, Any]:
    """Return the arguments of a client for a service."""
    # A context that trusts nobody: without TLS and proxies none is needed, and to read the
    # certificates takes a fifth of what a short command does.
    no_tls = server.is_this_machine and server.url.startswith("http:")
    return {
        "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if no_tls else True,
        "base_url": server.url,
        "headers": server.headers,
        "follow_redirects": False,  # wherever they lead, the key would be sent along
        "trust_env": not server.is_this_machine,
    }


def as_request(
    http: httpx2.Client | httpx2.AsyncClient,
    call: Call[Any],
    timeout_s: float,
    silence_s: float | None = None,
) -> httpx2.Request:
    """Return what is sent for a call.

    Args:
        http: which sends it.
        call: the request.
        timeout_s: the longest wait for the network.
        silence_s: the longest wait for a part of the answer, if that is another.
    """
    headers = dict(call.headers)
    if call.body is not None:
        headers["Content-Type"] = "application/json"
    return http.build_request(
        call.method,
        call.path,
        params=list(call.query),
        content=call.body,
        headers=headers,
        timeout=httpx2.Timeout(timeout_s, read=silence_s or timeout_s),
    )


def is_event_stream(response: httpx2.Response) -> bool:
    """Return whether events follow."""
    kind = response.headers.get("content-type", "").partition(";")[0]
    return response.status_code == 200 and kind.strip().lower() == "text/event-stream"


def as_answer(response: httpx2.Response, content: bytes) -> Answer:
    """Return an answer with the content that was read."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status_code, headers, content)


def as_failure(error: httpx2.RequestError, timeout_s: float) -> Failure:
    """Return why there is no answer.

    Args:
        error: what httpx2 raised.
        timeout_s: within which there should have been one.
    """
    was_sent = not isinstance(
        error,
        httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout | httpx2.ProxyError,
    )
    if isinstance(error, httpx2.TimeoutException):
        return Failure(f"it took more than {timeout_s:.1f} s", was_sent)
    return Failure(str(error) or type(error).__name__, was_sent)
