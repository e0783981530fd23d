"""The picture of a job's curves, drawn by a process of its own and kept while nothing changes."""

import asyncio
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

from service.errors import NotFoundError, OverloadedError, ServiceError

_FILES = ("metrics.jsonl", "steps.jsonl")
_KEPT = 16
_TIMEOUT_S = 60.0
# Matplotlib takes a second and 50 MiB, which the process that serves shall not have to spend.
_PROGRAM = (
    "import sys, pathlib; from syncbn.train.run.plots import plot_curves; "
    "plot_curves(pathlib.Path(sys.argv[1]))"
)

Signature = tuple[tuple[int, int] | None, ...]


class Curves:
    """Draws one picture at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, Signature], bytes] = OrderedDict()
        self._turn = asyncio.Lock()

    async def draw(self, run: Path, title: str) -> bytes:
        """Return the curves of a run as they are now, as a PNG file.

        Args:
            run: its directory, which is not written to.
            title: what stands above them.

        Raises:
            ServiceError: nothing was measured yet, or the picture could not be drawn.
        """
        signature = _sign(run)
        if not any(signature):
            raise NotFoundError("nothing was measured yet, so there are no curves")
        key = (str(run), signature)
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._turn:
                if key not in self._kept:
                    self._kept[key] = await _draw(run, title)
                self._kept.move_to_end(key)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
                return self._kept[key]
        except TimeoutError:
            raise OverloadedError(f"the curves were not drawn within {_TIMEOUT_S:g} s") from None


def _sign(run: Path) -> Signature:
    def sign(file: Path) -> tuple[int, int] | None:
        try:
            status = file.stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size) if status.st_size else None

    return tuple(sign(run / name) for name in _FILES)


async def _draw(run: Path, title: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="syncbn-curves-") as directory:
        # The picture's title is the directory's name, and the run may be another user's.
        copy = Path(directory) / title.replace("/", "∕").strip(".")[:100]
        copy.mkdir()
        for name in _FILES:
            (copy / name).symlink_to((run / name).resolve())
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", _PROGRAM, str(copy)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        picture = copy / "curves.png"
        if process.returncode or not picture.exists():
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise ServiceError(f"the curves could not be drawn: {last[:200]}")
        return picture.read_bytes()
