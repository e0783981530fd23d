"""Image files that samples are read from: found, read, and left out if they are damaged."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from syncbn.errors import ConfigError, ImageError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What Pillow by itself refuses, too, for fear of what it takes.
MAX_PIXELS = 178_956_970
_SHOWN = 10
_AT_ONCE = 1024


def read_file(file: str, read: Callable[[bytes], T]) -> T:
    """Return what is read from the bytes of an image file.

    Raises:
        ConfigError: the file cannot be read; it is named.
    """
    try:
        return read(Path(file).read_bytes())
    except (OSError, ImageError) as error:
        why = f"it {error}" if isinstance(error, ImageError) else f"{error}"
        raise ConfigError(
            f"cannot read the image {file}: {why}; repair it, remove it from data.path, or leave "
            "out such images by data.skip_damaged=true"
        ) from error


def files_below(directory: Path, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """Return the images below a directory, in an order that depends on their names alone."""
    return [
        str(Path(root) / name)
        for root, _, names in sorted(os.walk(directory, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(tuple(extensions))
    ]


def readable(count: int, read: Callable[[int], object], moves: Callable[[], None]) -> list[int]:
    """Return which of some samples can be read, and log those that cannot.

    Each is read once, as it is for training; several at a time.

    Args:
        count: samples.
        read: fetches one by its number; a ConfigError says that it cannot be read.
        moves: is called from time to time, so that nobody takes this for a hang.
    """

    def problem(number: int) -> ConfigError | None:
        try:
            read(number)
        except ConfigError as error:
            return error
        return None

    good: list[int] = []
    problems: list[ConfigError] = []
    for number, error in enumerate(in_threads(problem, range(count))):
        moves()
        if error is None:
            good.append(number)
        else:
            problems.append(error)
    if problems:
        log.warning(
            "data.skip_damaged: %d of %d samples are left out: %s%s",
            len(problems),
            count,
            "; ".join(str(error).partition("; ")[0] for error in problems[:_SHOWN]),
            f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "",
        )
    return good


def in_threads(work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Yield the result for each of any number of items, in their order, from a few threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(items), _AT_ONCE):  # millions at once would take gigabytes
            yield from pool.map(work, items[first : first + _AT_ONCE])


def relative_sizes(files: Sequence[str], root: str, most: int = 4096) -> list[tuple[str, int]]:
    """Return files' names below a directory and their sizes in bytes, -1 if they are not asked.

    Args:
        files: their paths.
        root: the directory.
        most: so many evenly spaced files are asked for their size, which takes long of millions.
    """
    every = -(-len(files) // most) or 1
    found: list[tuple[str, int]] = []
    for number, file in enumerate(files):
        try:
            size = Path(file).stat().st_size if number % every == 0 else -1
        except OSError:  # whoever reads it says so
            size = -1
        found.append((os.path.relpath(file, root), size))
    return found


def listed(names: Sequence[str]) -> str:
    """Return names for a message, of many the first five."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_utf8(path: Path) -> None:
    """Raise a ConfigError if the name of a directory is none that a class can have."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"data.path: the name of the directory {os.fsencode(path)!r} is not UTF-8, so that no "
            "bundle could hold it as the name of a class; rename it"
        ) from error
