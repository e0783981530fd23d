"""The log of a job: what the processes of all its attempts printed, read a piece at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_PIECE_BYTES = 1 << 20
_HEADER = re.compile(rb"\n=== attempt (\d{1,9}), [^\n]{1,64}===\r?\n")
_HEADER_BYTES = 128  # no such line is longer


@dataclass(frozen=True)
class Piece:
    """A part of a log.

    Attributes:
        text: its bytes.
        start: where it begins.
        end: where the next part begins.
        size_bytes: how long the log is by now.
    """

    text: bytes
    start: int
    end: int
    size_bytes: int


def read_piece(file: Path, offset: int, limit_bytes: int, attempt: int | None = None) -> Piece:
    """Return a part of a log, which ends between two letters; empty if nothing is there.

    Args:
        file: the log; one that does not exist is empty.
        offset: of the first byte, from the beginning; negative: from the end.
        limit_bytes: how long it may be.
        attempt: only what this attempt printed, as if that were the log; None: all.

    Raises:
        LookupError: there was no such attempt.
        OSError: the log cannot be read.
    """
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        if attempt is not None:
            raise LookupError(attempt) from None
        return Piece(b"", 0, 0, 0)
    with stream:
        first, last = 0, stream.seek(0, 2)
        if attempt is not None:
            first, last = _bounds(stream, last, attempt)
        size_bytes = last - first
        start = max(0, size_bytes + offset) if offset < 0 else min(offset, size_bytes)
        stream.seek(first + start)
        text = stream.read(min(limit_bytes, size_bytes - start))
    if offset < 0 and start > 0:
        # Not in the middle of a letter.
        skipped = next((at for at, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), 0)
        text, start = text[skipped:], start + skipped
    if start + len(text) < size_bytes:
        text = text[: len(text) - _cut_letter(text)] or text
    return Piece(text, start, start + len(text), size_bytes)


def _cut_letter(text: bytes) -> int:
    """Return how many bytes at the end are the beginning of a letter in UTF-8."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if length > back else 0
    return 0


def _bounds(stream: BinaryIO, size_bytes: int, attempt: int) -> tuple[int, int]:
    """Return where an attempt's part of the log begins and ends."""
    start: int | None = None
    for at, number in _headers(stream, size_bytes):
        if start is not None:
            return start, at
        if number == attempt:
            start = at
    if start is None:
        raise LookupError(attempt)
    return start, size_bytes


def _headers(stream: BinaryIO, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Give where each attempt's first line is, and the attempt's number.

    The log is gone through in parts, between which other threads have their turn.
    """
    stream.seek(0)
    at, rest = 0, b"\n"  # as if a line had ended before the first one
    while at < size_bytes and (part := stream.read(min(MAX_PIECE_BYTES, size_bytes - at))):
        text = rest + part
        begin = at - len(rest)
        at += len(part)
        # What may go on in the next part is looked at with it.
        keep = len(text) if at >= size_bytes else max(0, len(text) - _HEADER_BYTES)
        for found in _HEADER.finditer(text):
            if found.start() < keep:
                yield begin + found.start() + 1, int(found[1])
        rest = text[keep:]
