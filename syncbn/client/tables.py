"""Tables of plain text that fit a terminal."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

_GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of a table; one without any text is left out.

    Attributes:
        title: over the cells.
        cells: one a row.
        is_number: whether they stand at the right.
        least: the fewest letters that it may be shortened to where the terminal is narrow; None:
            it stays whole.
        cut: where: names differ at both ends, and lose their middle.
    """

    title: str
    cells: Sequence[str]
    is_number: bool = False
    least: int | None = None
    cut: Literal["middle", "end"] = "end"


def width_of(stream: TextIO) -> int | None:
    """Return how many letters a line may have; None if the stream is no terminal."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def table_lines(columns: Sequence[Column], width: int | None) -> Iterator[str]:
    """Yield the lines of a table, the titles first.

    Args:
        columns: with equally many cells.
        width: which no line exceeds; None: any may be as long as it is.
    """
    shown = [column for column in columns if any(column.cells)]
    if not shown:
        return
    widths = [max(map(len, (column.title, *column.cells))) for column in shown]
    if width is not None:
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
        # The last ones first: those are the sentences.
        for index in reversed(range(len(shown))):
            least = shown[index].least
            if least is not None and excess > 0:
                spared = min(excess, max(0, widths[index] - max(least, len(shown[index].title))))
                widths[index] -= spared
                excess -= spared
    rows = zip(*((column.title, *column.cells) for column in shown), strict=True)
    for row in rows:
        cells = [
            f"{shorten(cell, room, column.cut):{'>' if column.is_number else '<'}{room}}"
            for cell, room, column in zip(row, widths, shown, strict=True)
        ]
        line = _GAP.join(cells).rstrip()
        yield line if width is None else shorten(line, width)


def shorten(text: str, room: int, cut: Literal["middle", "end"] = "end") -> str:
    """Return a text, with … for what there is no room for."""
    if len(text) <= room:
        return text
    tail = (room - 1) // 2 if cut == "middle" else 0
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"
