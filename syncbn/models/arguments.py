"""Which arguments an architecture takes, and whether given ones fit."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from syncbn.errors import ModelError

Norm = Literal["batch", "whitening", "none"]

# What every architecture takes.
COMMON: Mapping[str, Any] = {
    "in_channels": int,
    "num_classes": int,
    "norm": Norm,
    "eps": float,
    "momentum": float,
    "whitening_group_size": int,
    "whitening_method": Literal["zca", "newton"],
    "whitening_iterations": int,
    "whitening_shrinkage": float,
}


def check_arguments(
    name: str, arguments: Mapping[str, Any], takes: Mapping[str, Any] | None
) -> None:
    """Raise unless arguments fit an architecture.

    Args:
        name: of the architecture.
        arguments: all that are given.
        takes: what it takes, by name, as for `_check_argument`; None: arguments of any name.

    Raises:
        ModelError: an argument is unknown, missing, or of another type.
    """
    expected = dict(takes or {}) | dict(COMMON)
    for key, value in arguments.items():
        if takes is not None and key not in expected:
            raise ModelError(
                f"architecture {name!r} takes no argument {key!r}; it takes {', '.join(expected)}"
            )
        _check_argument(name, key, value, expected.get(key, object))
    missing = [key for key in ("in_channels", "num_classes") if key not in arguments]
    if missing:
        raise ModelError(f"architecture {name!r} needs {', '.join(missing)}")


def _check_argument(name: str, key: str, value: object, expected: Any) -> None:
    """Raise unless a value fits.

    Args:
        name: of the architecture.
        key: of the argument.
        value: what was given.
        expected: int (positive), float (not negative), a Literal, or object for what a
            configuration can state.
    """
    where = f"argument {key!r} of architecture {name!r}"
    if expected is object:
        items: list[object] = value if isinstance(value, list) else [value]
        if not all(isinstance(item, bool | int | float | str) for item in items):
            raise ModelError(
                f"{where} must be a boolean, a number, a string or a list of these, got {value!r}"
            )
    elif choices := get_args(expected):
        if value not in choices:
            raise ModelError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int if expected is int else int | float):
        raise ModelError(f"{where} must be of type {expected.__name__}, got {value!r}")
    elif expected is int and value < 1:
        raise ModelError(f"{where} must be positive, got {value!r}")
    elif expected is float and not 0 <= value < math.inf:
        raise ModelError(f"{where} must be 0 or more, and finite, got {value!r}")
