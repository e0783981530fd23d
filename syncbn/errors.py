"""Every exception that syncbn raises on purpose, all of them `SyncBNError`s; and its warning."""


class SyncBNError(Exception):
    """Base class of everything syncbn raises because of what a user passed, configured or stored.

    Every subclass takes one message, so that it survives pickling between processes.
    """


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
