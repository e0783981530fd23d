"""What choices and keys mean, in words: the comments above them in conf/."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_KEY = re.compile(r"( *)(?:- )?(\w+):")


@dataclass(frozen=True)
class FileHelp:
    """The comments of one file.

    Attributes:
        whole: what the file is about: the comment at its top.
        keys: the comment above each key, by the key with dots.
    """

    whole: str
    keys: Mapping[str, str]


def read_help(file: Path) -> FileHelp:
    """Return the comments of a file of conf/, each as one line."""
    lines = iter(file.read_text(encoding="utf-8").splitlines())
    whole, first = _comment(lines)
    keys: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment, line = "", first
    while line is not None:
        if found := _KEY.match(line):
            indent, key = len(found[1]), found[2]
            path = [(at, name) for at, name in path if at < indent] + [(indent, key)]
            if comment:
                keys[".".join(name for _, name in path)] = comment
        comment, line = _comment(lines)
    return FileHelp(whole, keys)


def _comment(lines: Iterator[str]) -> tuple[str, str | None]:
    """Return the comment that comes next, which may be empty, and the line that it is about."""
    words: list[str] = []
    for line in lines:
        text = line.strip()
        if not text.startswith("#"):
            return " ".join(words), line
        words.append(text.removeprefix("#").strip())
    return " ".join(words), None
