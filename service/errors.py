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


class NotFoundError(ServiceError):
    """There is nothing of that name."""

    status = 404


class ModelNotFoundError(NotFoundError):
    """No model of that name and version is loaded."""


class BodyTimeoutError(ServiceError):
    """The request body did not arrive within the configured time, or not at all."""

    status = 408


class ConflictError(ServiceError):
    """The job's state does not allow what was asked for."""

    status = 409


class BodyTooLargeError(ServiceError):
    """The request body exceeds the configured size."""

    status = 413


class MediaTypeError(ServiceError):
    """The request body is not of the type that it must be."""

    status = 415


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


class LimitError(ServiceError):
    """A limit of the service of training jobs would be exceeded."""

    status = 429
    retry_after_s = 10


class TooManyStreamsError(LimitError):
    """As many streams of events as the configuration allows are open already."""


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


class StoreError(ServiceError):
    """The store of training jobs cannot be read or written at the moment."""

    status = 503
    retry_after_s = 5
