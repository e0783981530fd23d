"""What a job measured at its epochs or steps: lines of JSON, thinned out if they are many."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

MAX_LINES = 100_000
_LONGEST_LINE_BYTES = 1 << 20


def read_lines(file: Path, *, limit: int, after: float | None = None) -> list[dict[str, Any]]:
    """Return the lines of a file, oldest first; if there are more than wanted, evenly spread ones.

    Damaged lines are passed over, and so is a last one that is still being written.

    Args:
        file: metrics.jsonl or steps.jsonl of a run; one that does not exist has no lines.
        limit: how many to return at most, the newest always among them.
        after: only those of later steps.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return []
    kept: list[bytes] = []
    last, stride = b"", 1
    with stream:
        for number, text in enumerate(_later(stream, after)):
            last = text
            if number % stride == 0:
                kept.append(text)
                # As many as are wanted are left in the end, and never twice as many here.
                if len(kept) >= 2 * limit:
                    kept, stride = kept[::2], 2 * stride
    if len(kept) > limit:
        # Not only the newest ones are interesting, nor only the oldest.
        step = (len(kept) - 1) / max(1, limit - 1)
        kept = [kept[round(index * step)] for index in range(limit)]
    if kept and kept[-1] is not last:
        kept[-1] = last
    return [line for text in kept if (line := parse_line(text)) is not None]


def _later(stream: BinaryIO, after: float | None) -> Iterator[bytes]:
    while text := stream.readline(_LONGEST_LINE_BYTES):
        if not text.endswith(b"\n"):
            continue
        if after is not None:
            line = parse_line(text)
            if line is None or not _is_later(line, after):
                continue
        yield text


def _is_later(line: Mapping[str, Any], after: float) -> bool:
    step = line.get("step")
    return isinstance(step, int | float) and step > after


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Return the object that a line of JSON holds, also with NaN in it; None: it holds none."""
    try:
        line: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            line = json.loads(text)  # which knows NaN
        except (ValueError, RecursionError):
            return None
    return line if isinstance(line, dict) else None


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return lines as a table with a column for each key that one of them has."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def best_epoch(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the best epoch, as the run has noted, else the newest; empty if there is none."""
    noted = (line for line in reversed(lines) if line.get("best"))
    return next(noted, lines[-1] if lines else {})
