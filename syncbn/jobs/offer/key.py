"""One value that may be set: its type and range, what it means, and whether a given one fits."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.values import check_plain, close_to, shown

Kind = Literal["integer", "number", "boolean", "string", "enum", "list"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A value that may be set.

    Attributes:
        key: its name with dots, such as optim.lr.
        kind: what it is, as JSON says it; "enum" is one of some texts.
        help: what it means, in a sentence.
        default: what it is if nothing is said.
        nullable: whether null is a value of it.
        minimum: the least number.
        exclusive_minimum: what a number must be above.
        maximum: the largest number.
        exclusive_maximum: what a number must be below.
        choices: the texts of an enum.
        pattern: what a whole text must match.
        form: the pattern in words.
        max_items: the most items of a list.
        item: what each item of a list is.
    """

    key: str
    kind: Kind
    help: str
    default: Any = None
    nullable: bool = False
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    form: str = ""
    max_items: int | None = None
    item: "Key | None" = None

    def check(self, value: object) -> Any:
        """Return a value as the configuration has it: numbers that need no integer as floats.

        Raises:
            SubmissionError: it has another type, or is out of range, or none of the choices; the
                message names the key, the value and what is valid.
        """
        if value is None and self.nullable:
            return None
        match self.kind:
            case "boolean" if isinstance(value, bool):
                return value
            case "integer" if type(value) is int and self._contains(value):
                return value
            case "number" if type(value) in (int, float) and self._contains(cast(float, value)):
                return float(cast(float, value)) + 0.0  # no negative zero
            case "enum" | "string" if isinstance(value, str):
                return self._checked_text(value)
            case "list" if isinstance(value, list):
                return self._checked_items(cast(list[object], value))
            case _:
                raise self._refusal(value)

    def valid(self) -> str:
        """Return what is valid, to follow "must be"."""
        match self.kind:
            case "boolean":
                valid = "true or false"
            case "integer":
                valid = f"an integer {self._range()}"
            case "number":
                valid = f"a number {self._range()}"
            case "enum":
                valid = f"one of {', '.join(self.choices)}"
            case "string":
                valid = self.form
            case "list":
                assert self.item is not None
                valid = f"a list of at most {self.max_items} items, each {self.item.valid()}"
        return f"{valid}, or null" if self.nullable else valid

    def describe(self) -> dict[str, Any]:
        """Return the key as JSON, without what does not apply to it."""
        described: dict[str, Any] = {
            "key": self.key,
            "type": self.kind,
            "nullable": self.nullable,
            "default": self.default,
            "help": self.help,
        }
        for name in ("minimum", "exclusive_minimum", "maximum", "exclusive_maximum"):
            if (bound := getattr(self, name)) is not None:
                described[name] = bound
        if self.choices:
            described["choices"] = list(self.choices)
        if self.pattern is not None:
            described |= {"pattern": self.pattern, "form": self.form}
        if self.item is not None:
            item = self.item.describe()
            kept = {name: item[name] for name in item.keys() - {"key", "help", "default"}}
            described |= {"max_items": self.max_items, "item": kept}
        return described

    def _contains(self, number: float) -> bool:
        # Integers of any size compare exactly with floats; NaN compares with nothing.
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.exclusive_minimum is None or number > self.exclusive_minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.exclusive_maximum is None or number < self.exclusive_maximum)
            and not (isinstance(number, float) and not math.isfinite(number))
        )

    def _checked_text(self, text: str) -> str:
        if text in self.choices:
            return text
        if self.kind == "enum":
            close = close_to(text, self.choices)
            raise SubmissionError(f"{self.key}={shown(text)}: {close}must be {self.valid()}")
        check_plain(self.key, text)
        if self.pattern is None or re.fullmatch(self.pattern, text) is None:
            raise self._refusal(text)
        return text

    def _checked_items(self, items: list[object]) -> list[Any]:
        assert self.item is not None
        assert self.max_items is not None
        if len(items) > self.max_items:
            raise self._refusal(items)
        return [self.item.check(item) for item in items]

    def _refusal(self, value: object) -> SubmissionError:
        return SubmissionError(f"{self.key}={shown(value)}: must be {self.valid()}")

    def _range(self) -> str:
        low = (
            f"above {self.exclusive_minimum}"
            if self.exclusive_minimum is not None
            else f"from {self.minimum}"
        )
        join = "to" if self.exclusive_minimum is None else "and"
        if self.maximum is None:
            return f"{low} {join} below {self.exclusive_maximum}"
        return f"{low} {join} {'at most ' if join == 'and' else ''}{self.maximum}"


def key_of_schema(key: str, node: Mapping[str, Any], **known: Any) -> Key | None:
    """Return a key of which pydantic's JSON schema says type and range.

    Args:
        key: its name with dots.
        node: the JSON schema, with references resolved.
        known: other attributes of the key; a maximum counts if the schema has no lower one.

    Returns:
        The key; None if the schema allows any text, or an object, which nothing bounds.
    """
    alternatives = cast(list[Mapping[str, Any]], node.get("anyOf", [node]))
    nullable = any(each.get("type") == "null" for each in alternatives)
    (kind,) = (each for each in alternatives if each.get("type") != "null")
    maximum = known.pop("maximum", None)
    if "enum" in kind:
        return Key(key=key, kind="enum", nullable=nullable, choices=tuple(kind["enum"]), **known)
    match kind["type"]:
        case "boolean":
            return Key(key=key, kind="boolean", nullable=nullable, **known)
        case "integer" | "number":
            ranged = _range_of(kind, maximum)
            return Key(key=key, kind=kind["type"], nullable=nullable, **ranged, **known)
        case "string" if known.get("choices"):
            return Key(key=key, kind="enum", nullable=nullable, **known)
        case "array" if known.get("max_items"):
            item = known.pop("item", None) or key_of_schema(
                key, kind["items"], maximum=maximum, help=""
            )
            return Key(key=key, kind="list", nullable=nullable, item=item, **known)
        case _:
            return None


def _range_of(node: Mapping[str, Any], maximum: float | None) -> dict[str, float]:
    """Return the bounds of a number; integers have none that are exclusive."""
    bounds: dict[str, float] = {}
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if node["type"] == "integer":
        low = above + 1 if above is not None else low
        high = below - 1 if below is not None else high
        above = below = None
    if low is not None:
        bounds["minimum"] = low
    if above is not None:
        bounds["exclusive_minimum"] = above
    if maximum is not None and (below is None or maximum < below):
        high, below = maximum if high is None else min(high, maximum), None
    if high is not None:
        bounds["maximum"] = high
    if below is not None:
        bounds["exclusive_maximum"] = below
    return bounds
