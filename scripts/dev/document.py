"""Puts tables that scripts make into the pages of docs/, between their markers."""

import sys

from scripts import REPOSITORY

DOCUMENTS = REPOSITORY / "docs"
END = "<!-- end of table -->"


def write_table(page: str, source: str, table: str) -> None:
    """Replace what stands in a page between the marker of a source and the end of its table.

    Args:
        page: the name of a file in docs/.
        source: the command that made the table, as `python -m` takes it.
        table: in markdown.
    """
    document = DOCUMENTS / page
    begin = f"<!-- table: {source} -->"
    before, found, rest = document.read_text().partition(begin)
    if not found:
        sys.exit(f"{document} has no line {begin!r} to put the table after")
    document.write_text(f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}")
