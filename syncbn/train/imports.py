"""The user's own functions, by their import paths."""

import importlib
from typing import Any

from syncbn.errors import ConfigError


def imported(path: str, key: str, what: str = "a function") -> Any:
    """Return what an import path names, which must be callable; runs the code of its module.

    Args:
        path: package.module:function.
        key: of the configuration, for errors.
        what: what it must be, for errors.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever somebody else's module raises
        raise ConfigError(
            f"{key}={path} cannot be imported: {type(error).__name__}: {error}; it must be "
            "package.module:function, of a package that is installed or in PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key}={path} is a {type(found).__name__}; it must be {what}")
    return found
