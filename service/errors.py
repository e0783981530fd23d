"""What the service refuses, each with the HTTP status that says so."""


class ServiceError(Exception):
    """Base class of what a client is told; `str()` of it is the message."""

    status = 500


class InvalidRequestError(ServiceError):
    """The request does not follow the protocol, or does not fit the model."""

    status = 400


class ModelNotFoundError(ServiceError):
    """No model of that name is loaded."""

    status = 404


class BodyTimeoutError(ServiceError):
    """The request body did not arrive within the configured time, or not at all."""

    status = 408


class BodyTooLargeError(ServiceError):
    """The request body exceeds the configured size."""

    status = 413


class OverloadedError(ServiceError):
    """The prediction was not ready within the configured time."""

    status = 503
