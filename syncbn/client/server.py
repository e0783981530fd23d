"""Where a service of jobs is, how it is asked, and what is said when it cannot be reached."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from syncbn.errors import ServerError, SubmissionError

DEFAULT_URL = "http://127.0.0.1:8000"
_KEY_ADVICE = "give one: key=…, --key-file or the environment's SYNCBN_API_KEY"
_ADVICE = {
    401: "the key is missing or unknown to the service",
    403: "the key may not do that",
}


@dataclass(frozen=True)
class Server:
    """A service of jobs, and the manners in which it is asked.

    Attributes:
        url: without a slash at its end.
        key: of the service; never shown.
        timeout_s: within which a request is answered, repetitions included.
        retries: how often a request is repeated, if that can do no harm.
        outage_s: for how long what watches a job sits out that the service cannot be reached.
        clock: seconds that pass.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 30
    retries: int = 3
    outage_s: float = 60
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked_url(self.url))
        if self.key is not None:
            object.__setattr__(self, "key", _checked_key(self.key))
        if not self.timeout_s > 0:
            raise SubmissionError(f"timeout_s={self.timeout_s}: must be above 0 seconds")
        if self.retries < 0:
            raise SubmissionError(f"retries={self.retries}: must be 0 or more")

    @property
    def headers(self) -> Mapping[str, str]:
        """Of every request."""
        known = {"User-Agent": "syncbn-jobs", "Accept": "application/json"}
        return known if self.key is None else {**known, "Authorization": f"Bearer {self.key}"}

    @property
    def is_this_machine(self) -> bool:
        """Whether it is asked without a proxy, whatever the environment says of proxies."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def unreachable(self, reason: str, is_open: bool) -> ServerError:
        """Return the error of a request that got no answer.

        Args:
            reason: why.
            is_open: whether nobody knows if the service did what it asks for.
        """
        unknown = " Whether it did what was asked is not known: look at the job." * is_open
        return ServerError(
            f"no answer from {self.url}: {reason}. Is syncbn-serve running there?{unknown}"
        )

    def misunderstood(self, status: int, asked: str, reason: str) -> ServerError:
        """Return the error of an answer that no service of jobs gives."""
        return _with_status(
            status,
            f"{self.url} answers {asked} with what no service of jobs says: {reason}. Is the URL "
            "that of syncbn-serve?",
        )

    def refused(self, status: int, said: str) -> ServerError:
        """Return the error of an answer that says what was wrong.

        Args:
            status: of the answer.
            said: its text.
        """
        advice = _ADVICE.get(status)
        if advice is None:
            return _with_status(status, said)
        if status == 401 and self.key is None:
            advice = f"the service wants a key; {_KEY_ADVICE}"
        return _with_status(status, f"{said} (HTTP {status}: {advice})")

    def moved(self, status: int, target: str) -> ServerError:
        """Return the error of an answer that sends somewhere else, where no key is taken."""
        return _with_status(
            status,
            f"{self.url} sends on to {target or 'nowhere'} (HTTP {status}), which is not followed, "
            "so that no key gets to another host; give the URL of the service itself",
        )


def _with_status(status: int, message: str) -> ServerError:
    error = ServerError(message)
    error.status = status
    return error


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, or brackets that do not match
        raise SubmissionError(f"url={url!r} is not valid; give one such as {DEFAULT_URL}") from None
    if "@" in parts.netloc:  # it may hold a password, which is not repeated
        raise SubmissionError(
            f"the URL of {parts.hostname} holds a user or a password, which end up in logs; "
            f"leave them out and {_KEY_ADVICE}"
        )
    if not is_valid or parts.query or parts.fragment:
        raise SubmissionError(
            f"url={url!r} is not the address of a service; give one such as {DEFAULT_URL}, with "
            "http:// or https://, and without ? and #"
        )
    return url.strip().rstrip("/")


def _checked_key(key: str) -> str:
    key = key.strip()
    # The value itself is a secret.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SubmissionError(
            f"the key of {len(key)} characters is none of syncbn-keys: it must be one word of "
            "printable ASCII characters; is it the right file?"
        )
    return key
