"""What was wished for by API, and how all processes of a service come to know of it."""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from filelock import FileLock

_FILE, _LOCK = "wishes.json", "wishes.lock"
_WORKER = "worker-"
_TIMEOUT_S = 60.0
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Wishes:
    """What was wished for so far.

    Attributes:
        generation: how many wishes there were.
        unloaded: the names of models that shall not be served.
        retry: the generation in which a model was wished to be loaded last, by its name.
    """

    generation: int = 0
    unloaded: tuple[str, ...] = ()
    retry: Mapping[str, int] = field(default_factory=dict[str, int])

    def to_load(self, name: str) -> "Wishes":
        """Return these and the wish to load a model."""
        generation = self.generation + 1
        unloaded = tuple(each for each in self.unloaded if each != name)
        return Wishes(generation, unloaded, {**self.retry, name: generation})

    def to_unload(self, name: str) -> "Wishes":
        """Return these and the wish to unload a model."""
        return Wishes(self.generation + 1, (*{*self.unloaded, name},), self.retry)


@dataclass(frozen=True)
class _Acknowledgement:
    generation: int
    failures: Mapping[str, str]


class DesiredState:
    """The wishes, in memory for one process, or in files that several share.

    Args:
        directory: that they share; None: this process is alone.
        pid: under which this process says how far it is.
    """

    def __init__(self, directory: Path | None, pid: int | None = None) -> None:
        self._directory = directory
        self._pid = os.getpid() if pid is None else pid
        self._seen: tuple[int, int] | None = None
        self._wishes = Wishes()
        self._own = _Acknowledgement(0, {})

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self._directory is not None

    def has_changed(self) -> bool:
        """Return whether there may be wishes that were not read yet."""
        return self._directory is not None and self._sign(self._directory) != self._seen

    def read(self) -> Wishes:
        """Return all wishes so far."""
        if self._directory is None:
            return self._wishes
        self._seen = self._sign(self._directory)
        try:
            return msgspec.json.decode((self._directory / _FILE).read_bytes(), type=Wishes)
        except FileNotFoundError:
            return Wishes()

    def write(self, change: Callable[[Wishes], Wishes]) -> Wishes:
        """Add a wish, and return all; takes turns with the other processes."""
        if self._directory is None:
            self._wishes = change(self._wishes)
            return self._wishes
        with FileLock(self._directory / _LOCK, timeout=_TIMEOUT_S):
            wishes = change(self.read())
            _replace(self._directory / _FILE, msgspec.json.encode(wishes))
            return wishes

    def acknowledge(self, generation: int, failures: Mapping[str, str]) -> None:
        """Say that this process did what was wished for up to a generation.

        Args:
            generation: of `Wishes`.
            failures: why models could not be loaded, by their names.
        """
        self._own = _Acknowledgement(generation, failures)
        if self._directory is not None:
            file = self._directory / f"{_WORKER}{self._pid}"
            _replace(file, msgspec.json.encode(self._own))

    async def wait_for_all(self, generation: int) -> Mapping[str, str]:
        """Return why models could not be loaded, once every live process is so far.

        It gives up waiting after a minute: a process that takes longer still does what is wished.
        """
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            others = self._others()
            everyone = [self._own, *others]
            if all(each.generation >= generation for each in everyone):
                break
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(_PAUSE_S)
        return {name: why for each in everyone for name, why in each.failures.items()}

    def leave(self) -> None:
        """Say that nobody need wait for this process any more."""
        if self._directory is not None:
            (self._directory / f"{_WORKER}{self._pid}").unlink(missing_ok=True)

    def _others(self) -> list[_Acknowledgement]:
        found: list[_Acknowledgement] = []
        if self._directory is None:
            return found
        for file in self._directory.glob(f"{_WORKER}*"):
            pid = int(file.name.removeprefix(_WORKER))
            if pid == self._pid:
                continue
            try:
                os.kill(pid, 0)
                found.append(msgspec.json.decode(file.read_bytes(), type=_Acknowledgement))
            except ProcessLookupError:
                file.unlink(missing_ok=True)
            except FileNotFoundError:  # it has just left
                pass
        return found

    def _sign(self, directory: Path) -> tuple[int, int] | None:
        try:
            status = (directory / _FILE).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino


def _replace(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=file.parent)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    Path(name).replace(file)
