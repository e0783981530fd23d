"""What the service refuses, each with the HTTP status that says so."""


class ServiceError(Exception):
    """Base class of what a client is told; `str()` of it is the message.

    Attributes:
        status: the HTTP status of the answer.
        outcome: what the metrics count it as.
        retry_after_s: when it is worth another try; None: not by waiting.
    """

    status = 500
    outcome = "refused"
    retry_after_s: int | None = None


class InvalidRequestError(ServiceError):
    """The request does not follow the protocol, or does not fit the model."""

    status = 400


class KeyMissingError(ServiceError):
    """The request names no API key, or an unknown one."""

    status = 401


class ForbiddenError(ServiceError):
    """The request's API key does not allow this."""

    status = 403


class ModelNotFoundError(ServiceError):
    """No model of that name and version is loaded."""

    status = 404


class BodyTimeoutError(ServiceError):
    """The request body did not arrive within the configured time, or not at all."""

    status = 408


class BodyTooLargeError(ServiceError):
    """The request body exceeds the configured size."""

    status = 413


class EncodingError(ServiceError):
    """The request body is encoded in a way that the service does not know."""

    status = 415


class QueueFullError(ServiceError):
    """As many samples as the configuration allows wait for the model already."""

    status = 429
    outcome = "full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientGoneError(ServiceError):
    """The client went away before its turn came; nobody reads this answer."""

    status = 499
    outcome = "cancelled"


class ModelFailedError(ServiceError):
    """The model raised an exception on this request's samples."""

    outcome = "failed"


class LoadError(ServiceError):
    """A model cannot be loaded from what is in its directory."""

    status = 400


class OverloadedError(ServiceError):
    """The prediction was not ready within the configured time."""

    status = 503
    outcome = "expired"
    retry_after_s = 1
