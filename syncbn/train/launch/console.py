"""What a job's processes print, of all its attempts, one after the other in one file."""

import os
from datetime import UTC, datetime

_STDIN, _STDOUT, _STDERR = range(3)


def header(attempt: int) -> str:
    """Return the line that begins an attempt."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"=== attempt {attempt}, {now} ==="


def append_to(console: str, line: str) -> None:
    """Have this process print to the end of a file, behind a line of its own.

    Args:
        console: the file.
        line: what is written first; empty: nothing.
    """
    file = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if line:
        os.write(file, f"{line}\n".encode())
    print_to(file, file)
    os.close(file)


def print_to(output: int, error: int) -> None:
    """Have this process print to open files, and read nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _STDIN)
    os.close(nothing)
    os.dup2(output, _STDOUT)
    os.dup2(error, _STDERR)
