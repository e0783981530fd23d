"""What is typed to change a job, such as optim.lr=0.05: read as syncbn-train reads it.

The values are those of Hydra's grammar that can be submitted: null, true, numbers, texts with or
without quotes, lists, and for a sweep several with commas, choice(…) or range(…).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from syncbn.client.results import Value
from syncbn.errors import SubmissionError

Scalar: TypeAlias = bool | int | float | str | None

_INTEGER = re.compile(r"[+-]?(0|[1-9](_?\d)*)")
_WHOLE, _DIGITS = r"(0|[1-9](_?\d)*)", r"\d(_?\d)*"
_POINT = rf"({_WHOLE}?\.{_DIGITS}|{_WHOLE}\.)"
_FLOAT = re.compile(
    rf"[+-]?({_POINT}|({_WHOLE}|{_POINT})[eE][+-]?{_DIGITS}|[iI][nN][fF]|[nN][aA][nN])"
)
_KEY = re.compile(r"\+{0,2}([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\((.*)\)", re.DOTALL)
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MOST_VALUES = 10_000  # of a range; no service takes as many jobs


@dataclass(frozen=True)
class Override:
    """What is typed of a key.

    Attributes:
        key: its name with dots, or a group.
        values: one, or those of a sweep.
        texts: the same as they were typed.
    """

    key: str
    values: Sequence[Value]
    texts: Sequence[str]


def read_overrides(typed: Sequence[str], is_sweep: bool) -> list[Override]:
    """Return what is typed of each key.

    Args:
        typed: the words of a command line.
        is_sweep: whether a key may have several values.

    Raises:
        SubmissionError: one has no form that can be submitted, or a key is there twice.
    """
    found: dict[str, Override] = {}
    for word in typed:
        override = _read(word)
        if len(override.values) > 1 and not is_sweep:
            raise SubmissionError(
                f"{word}: has several values; -m submits one job for each, quotes make a text of "
                f"them: \"{override.key}='…'\", and brackets a list: '{override.key}=[…]'"
            )
        if override.key in found:
            raise SubmissionError(f"{word}: {override.key} is there twice; leave one out")
        found[override.key] = override
    return list(found.values())


def _read(word: str) -> Override:
    match = _KEY.fullmatch(word)
    if match is None:
        raise SubmissionError(
            f"{word!r}: must be KEY=VALUE, such as optim.lr=0.05, or GROUP=CHOICE, such as "
            "norm=local"
        )
    key, text = match[1], _trimmed(match[2])
    call = _CALL.fullmatch(text)
    if call is None:
        texts = _split(word, text)
    elif call[1] == "choice" and call[2].strip():
        texts = _split(word, call[2])
    elif call[1] == "range":
        texts = _range(word, _split(word, call[2]))
    else:
        raise SubmissionError(
            f"{word}: of functions, only choice(A,B) and range(FIRST,END) can be submitted; type "
            "the values themselves, or put quotes around a text"
        )
    return Override(key, [_value(word, each) for each in texts], texts)


def _range(word: str, parts: Sequence[str]) -> list[str]:
    """Return the numbers of range(END), range(FIRST,END) or range(FIRST,END,STEP)."""
    if not all(_INTEGER.fullmatch(part) for part in parts) or len(parts) > 3:
        raise SubmissionError(
            f"{word}: must be range(END), range(FIRST,END) or range(FIRST,END,STEP) of integers"
        )
    limits = [int(part) for part in parts]
    if limits[2:] == [0]:
        raise SubmissionError(f"{word}: a step of 0 never comes to the end")
    numbers = range(*limits)
    if not 0 < len(numbers) <= _MOST_VALUES:
        raise SubmissionError(
            f"{word}: has {len(numbers)} values; it must have 1 to {_MOST_VALUES}"
        )
    return [str(number) for number in numbers]


def _value(word: str, text: str) -> Value:
    if text.startswith("["):
        if not text.endswith("]"):
            raise SubmissionError(f"{word}: after the list there is something else")
        items = _split(word, text[1:-1]) if text[1:-1].strip() else []
        return [_scalar(word, item) for item in items]
    return _scalar(word, text)


def _scalar(word: str, text: str) -> Scalar:
    if text[:1] in ("[", "{"):
        raise SubmissionError(
            f"{word}: a mapping or a list within a list cannot be submitted, only texts, numbers, "
            "true, false, null and lists of these"
        )
    if text[:1] in ("'", '"'):
        return _unquoted(word, text)
    match text.lower():
        case "null":
            return None
        case "true" | "false":
            return text.lower() == "true"
        case _:
            pass
    if _INTEGER.fullmatch(text):
        try:
            return int(text)
        except ValueError:  # thousands of digits
            raise SubmissionError(f"{word[:40]}…: the number is too long") from None
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _unquoted(word: str, text: str) -> str:
    quote, body = text[0], text[1:-1]
    if len(text) < 2 or text[-1] != quote or re.search(rf"(?<!\\){quote}", body):
        raise SubmissionError(f"{word}: the quote {quote} must be around the whole text")
    return body.replace(f"\\{quote}", quote)


def _split(word: str, text: str) -> list[str]:
    """Return the parts between the commas that are in no quotes and brackets."""
    parts, closing, quote, start = list[str](), list[str](), "", 0
    for position, letter in enumerate(text):
        if quote:
            if letter == quote and text[position - 1] != "\\":
                quote = ""
        elif letter in "'\"" and not text[start:position].strip(" [{("):
            quote = letter
        elif letter in _CLOSING:
            closing.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            if not closing or closing.pop() != letter:
                raise SubmissionError(f"{word}: the bracket {letter} closes nothing")
        elif letter == "," and not closing:
            parts.append(_trimmed(text[start:position]))
            start = position + 1
    parts.append(_trimmed(text[start:]))
    if quote or closing:
        raise SubmissionError(f"{word}: {quote or closing[-1]} is missing at the end")
    if len(parts) > 1 and "" in parts:
        raise SubmissionError(f"{word}: between two commas, there is no value")
    return parts


def _trimmed(text: str) -> str:
    """Return a text without the spaces around it, but with those behind a colon, as Hydra."""
    trimmed = text.strip()
    return text.lstrip() if trimmed.endswith(":") else trimmed
