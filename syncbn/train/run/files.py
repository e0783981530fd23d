"""Files of a run: lines of JSON that are added to, and files that appear whole or not at all."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of metrics, without lines that are damaged, which is said."""
    if not file.exists():
        return []
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    # The last line may have been cut short by a kill, and then says nothing.
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            assert isinstance(line["step"], int | float)
            assert isinstance(line.get("epoch", 0), int | float)
            lines.append(line)
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            damaged.append(number)
    if damaged:
        log.warning("%s: passed over damaged lines %s", file, ", ".join(map(str, damaged)))
    return lines


def append_line(file: Path, values: Mapping[str, Any]) -> None:
    """Add an object to a file of lines, in one write."""
    with file.open("a") as stream:
        stream.write(json.dumps(values) + "\n")


def replace_file(file: Path, content: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
