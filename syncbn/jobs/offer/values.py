"""Values that others send: how errors show them, and which texts may go into a configuration."""

import difflib
from collections.abc import Iterable
from typing import Any

from syncbn.errors import SubmissionError

Scalar = bool | int | float | str | None

_SHOWN = 60  # characters
_FEW = 8
# An integer of more bits may have more digits than Python is willing to print.
_BITS = 128
# A comparison takes time that grows with the square of the length.
_COMPARED = 100

# What OmegaConf or Hydra would take for something else than text.
_MARKS = {"${": "a reference to another value", "\\": "an escape", "???": "a missing value"}


def shown(value: object) -> str:
    """Return a value for an error: short, printable ASCII, whatever it is."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if value.bit_length() > _BITS:
            return f"(an integer of {value.bit_length()} bits)"
        case str():
            return _short(value)
        case int() | float():
            return repr(value)
        case list():
            items: list[Any] = value
            if len(items) > _FEW or any(isinstance(item, list | dict) for item in items):
                return f"(a list of {len(items)})"
            return f"[{', '.join(map(shown, items))}]"
        case dict():
            return "(an object)"
        case _:
            return f"(a {type(value).__name__})"


def close_to(name: str, known: Iterable[str]) -> str:
    """Return "did you mean NAME? " for a misspelt name, or nothing if no known one is close."""
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) <= _COMPARED else []
    return f"did you mean {close[0]}? " if close else ""


def check_plain(key: str, text: str) -> None:
    """Check that a text cannot be taken for anything but itself.

    Raises:
        SubmissionError: it has characters that are not printable ASCII, or that mean something to
            OmegaConf, which would read files or the environment for some of them.
    """
    if not (text.isascii() and text.isprintable()):
        raise SubmissionError(f"{key}={shown(text)}: must be printable ASCII")
    for mark, meaning in _MARKS.items():
        if mark in text:
            raise SubmissionError(
                f"{key}={shown(text)}: must not have {mark} in it, which would stand for {meaning}"
            )


def _short(text: str) -> str:
    start = text[: _SHOWN + 1]
    plain = start if start.isascii() and start.isprintable() and start else ascii(start)
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."
