"""Every exception that syncbn raises on purpose, all of them `SyncBNError`s; and its warning."""

from typing import Self


class SyncBNError(Exception):
    """Base class of everything syncbn raises because of what a user passed, configured or stored.

    Every subclass takes one message, so that it survives pickling between processes.

    Attributes:
        reason: of an error that ends a training job: a code by which programs tell what to do, of
            those in `syncbn.train.run.reasons`; None where the class says enough.
    """

    reason: str | None = None

    def because(self, reason: str) -> Self:
        """Give the error the code of its reason, which is pickled with it, and return it."""
        self.reason = reason
        return self


class InputError(SyncBNError, ValueError):
    """A tensor or an argument given to a layer does not fit it."""


class ReplicaError(SyncBNError, RuntimeError):
    """The replicas did not all make the same call, or one of them is gone."""


class ConversionError(SyncBNError, TypeError):
    """A module cannot be converted without losing behavior of its own."""


class ConversionWarning(UserWarning):
    """A conversion leaves layers alone that look as if they should be converted."""


class ModelError(SyncBNError, ValueError):
    """An architecture is unknown, or its arguments do not fit it."""


class BundleError(SyncBNError):
    """A bundle cannot be written, or what was read is not a valid bundle."""


class ConfigError(SyncBNError, ValueError):
    """A job's configuration is unknown, mistyped or contradicts itself."""


class TrainingError(SyncBNError, RuntimeError):
    """A training job started and did not finish."""


class DataError(SyncBNError, RuntimeError):
    """A sample cannot be read while a job trains, on one rank alone."""


class ImageError(SyncBNError, ValueError):
    """An image file cannot be read."""


class JobError(SyncBNError):
    """Base class of what the service of training jobs refuses or cannot do."""


class SubmissionError(JobError, ValueError):
    """What was submitted or asked for is unknown, mistyped, out of range or not allowed."""


class JobSettingsError(JobError, ValueError):
    """The administrator's file of settings is not valid."""


class JobNotFoundError(JobError, LookupError):
    """There is no job of that identifier."""


class JobActionError(JobError):
    """A job's state does not allow what was asked for."""


class JobLimitError(JobError):
    """A limit of the service would be exceeded."""


class JobStoreError(JobError, OSError):
    """The store of jobs cannot be read or written."""


class EngineError(JobError, RuntimeError):
    """What runs the jobs did not do what it was told, or nobody knows whether it did."""


class ServerError(JobError):
    """A client's service of jobs refused a request, cannot be reached, or is none.

    Attributes:
        status: of its answer, such as 409; None if there was none.
    """

    status: int | None = None


class JobTimeoutError(JobError, TimeoutError):
    """A job did not end within the time that somebody wanted to wait for it."""
