"""Puts tables that scripts make into the pages of docs/, between their markers."""

import sys
from pathlib import Path

DOCUMENTS = Path(__file__).parent.parent / "docs"
END = "<!-- end of table -->"


def write_table(page: str, source: str, table: str) -> None:
    """Replace what stands in a page between the marker of a source and the end of its table."""
    document = DOCUMENTS / page
    begin = f"<!-- table: scripts/{source} -->"
    before, found, rest = document.read_text().partition(begin)
    if not found:
        sys.exit(f"{document} has no line {begin!r} to put the table after")
    document.write_text(f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}")
