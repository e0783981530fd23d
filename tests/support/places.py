"""Every place of a run, as each of its ranks passes it: counted, told to stop at, killed at.

A place is an entry to or a return from one of the functions that a run is made of, a call of
`Watch.at`, or the moment before a file of the run is made, changed, renamed or removed, which
Python's own audit events tell. The moment after one is the moment before the next.

Nothing of a run depends on time here: checkpoints are written at once or as late as they may be,
which are the two extremes of what their thread does, and all clocks of the loop stand still.
"""

import functools
import hashlib
import math
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

Files = dict[str, bytes | None]
"""What lies in a directory, by relative path; None for a directory."""

LOOK = "look"
"""The place at which a rank looks whether it was told to stop."""

_POLLS = ("waiting for ranks that are", "asking who is missing")  # as often as they need
_MUTATIONS = frozenset(
    {
        *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"),
        *("os.symlink",),
    }
)
# What never decides how a run goes on: the log, and locks, which lie there empty.
IGNORED = re.compile(r"(^|/)(run\.log|\.lock|\.publish\.lock|config\.yaml(\.tmp)?)$")
# What a thread of its own writes at any time, of which no run goes on in another way.
_AT_ANY_TIME = re.compile(r"(^|/)status\.json(\.tmp)?$")
# Names that are new each time.
RANDOM = re.compile(r"\.(bundle|new)\.\w+")
_COUNT = re.compile(r"\d+")


@dataclass(frozen=True)
class Act:
    """What is done at places of an attempt.

    Attributes:
        writes: when a checkpoint is written: "at once", or "late", when it is waited for.
        rank: who acts; None: nobody.
        signal: what it sends to itself.
        at: before which of the places that it passes, counted from 0.
        snapshots: a directory for what lies in the work directory at each place of rank 0, each
            content once; None: not to be kept.
    """

    writes: Literal["at once", "late"] = "at once"
    rank: int | None = None
    signal: int = 0
    at: int = 0
    snapshots: Path | None = None


@dataclass
class Snapshot:
    """What a kill leaves.

    Attributes:
        place: where it was taken first.
        files: what lay there.
    """

    place: str
    files: Files = field(repr=False)


def kind(place: str) -> str:
    """Return the name of a place without what is counted in it."""
    return _COUNT.sub("#", place)


def is_of_a_file(place: str) -> bool:
    """Return whether a place is the moment before a file is changed."""
    return f"os.{place.split()[0]}" in _MUTATIONS or place.startswith("open ")


def read_files(directory: Path) -> Files:
    """Return what lies in a directory, but what is written at any time."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if not _AT_ANY_TIME.search(str(path))
    }


def write_files(directory: Path, files: Files) -> None:
    """Put files into a directory, with the directories that they are in."""
    for name, content in files.items():
        path = directory / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def digest(files: Files) -> str:
    """Return what tells contents apart from which a run goes on in another way."""
    told = hashlib.sha256()
    for name, content in sorted(files.items()):
        if not IGNORED.search(name):
            told.update(f"{RANDOM.sub('.temporary', name)}\0".encode())
            told.update(b"-" if content is None else hashlib.sha256(content).digest())
    return told.hexdigest()


class Tracer:
    """Counts the places of this rank, and does at one of them what it is told.

    Args:
        work: the directory below which the files of the run lie, and what it publishes.
        rank: this rank.
        act: what to do.

    Attributes:
        places: what was passed so far, in order.
    """

    def __init__(self, work: Path, rank: int, act: Act) -> None:
        self.places: list[str] = []
        self._work = work
        self._rank = rank
        self._act = act
        self._seen: set[str] = set()
        self._busy = False
        self._main = threading.current_thread()

    def pass_by(self, place: str) -> None:
        """Be at a place; only the main thread counts, as it alone does what a run is made of."""
        if self._busy or threading.current_thread() is not self._main:
            return
        self._busy = True
        try:
            act = self._act
            if act.rank == self._rank and len(self.places) == act.at:
                os.kill(os.getpid(), act.signal)
            self.places.append(place)
            if act.snapshots is not None and self._rank == 0 and place != LOOK:
                self._keep(act.snapshots, place)
        finally:
            self._busy = False

    def _keep(self, directory: Path, place: str) -> None:
        files = read_files(self._work)
        if (name := digest(files)) not in self._seen:
            self._seen.add(name)
            file = directory / f"{len(self._seen):04d}.pickle"
            file.write_bytes(pickle.dumps(Snapshot(place, files)))

    def install(self) -> None:
        """Have the places of this process counted from now on."""
        self._count_functions()
        self._count_looks()
        self._stop_clocks()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count what changes a file below the work directory."""
        if event not in _MUTATIONS or self._busy:
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        # A rename has two paths, of which the second says what becomes of the first.
        elif event in ("os.rename", "os.link", "os.symlink"):
            path = arguments[1]
        else:
            path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        # What shutil removes by a directory's descriptor has no more than a name.
        name = os.fspath(path)
        if name.startswith("/") and not name.startswith(f"{self._work}/"):
            return
        name = name.removeprefix(f"{self._work}/")
        if not IGNORED.search(name):
            self.pass_by(f"{event.removeprefix('os.')} {RANDOM.sub('.temporary', name)}")

    def _count_functions(self) -> None:
        from syncbn.train import export, loop, step
        from syncbn.train.journal import Journal
        from syncbn.train.launch import worker
        from syncbn.train.launch.watchdog import Watch
        from syncbn.train.run import checkpoint
        from syncbn.train.run.directory import RunDirectory
        from syncbn.train.run.writer import Records

        def draw(run_path: Path) -> Path:
            (run_path / "curves.png").touch()
            return run_path / "curves.png"

        export.plot_curves = draw  # it would take longer than all the rest, and nothing reads it
        for owner, names in {
            worker: ("train",),
            loop: ("resume", "evaluate", "export"),
            export: ("recalibrate", "write_bundle", "plot_curves", "publish"),
            step.Stepper: ("make", "finish"),
            Journal: ("begin_epoch", "end_epoch", "finish"),
            Records: ("write_checkpoint", "finish"),
            RunDirectory: ("append_metrics", "append_step", "write_result"),
        }.items():
            for name in names:
                setattr(owner, name, self._counted(getattr(owner, name)))
        at = Watch.at

        def counted_at(watch: Watch, step: int, doing: str) -> None:
            at(watch, step, doing)
            if not doing.startswith(_POLLS):
                self.pass_by(f"{doing}, step {step}")

        setattr(Watch, "at", counted_at)  # noqa: B010 -- its parameters have other names
        checkpoint.ThreadPoolExecutor = _Late if self._act.writes == "late" else _AtOnce  # pyright: ignore[reportAttributeAccessIssue] -- what of it is needed

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__qualname__.rpartition("<locals>.")[2]

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(f"before {name}")
            result = function(*args, **kwargs)
            self.pass_by(f"after {name}")
            return result

        return counted

    def _count_looks(self) -> None:
        from syncbn.train.launch.watchdog import Watch

        def look(watch: Watch) -> int:
            self.pass_by(LOOK)
            return vars(watch).get("stop_signal", 0)

        def note(watch: Watch, number: int) -> None:
            vars(watch)["stop_signal"] = number

        Watch.stop_signal = property(look, note)  # pyright: ignore[reportAttributeAccessIssue] -- an attribute of each watch otherwise

    def _stop_clocks(self) -> None:
        from syncbn.train import feed, journal, loop

        loop.time = SimpleNamespace(monotonic=lambda: 0.0)  # pyright: ignore[reportAttributeAccessIssue] -- what of it is needed
        journal.time = SimpleNamespace(monotonic=_Never, time=lambda: 0.0)  # pyright: ignore[reportAttributeAccessIssue] -- as above
        # So that few samples make several batches.
        feed._HELD_OUT_BATCH_SIZE = 2  # pyright: ignore[reportPrivateUsage] -- no setting


class _Never(float):
    """A time from which on each speed is 0."""

    def __sub__(self, earlier: float) -> float:
        return math.inf


class _AtOnce:
    """What writes checkpoints, as if its thread were done before the main thread goes on."""

    def __init__(self, workers: int, name: str) -> None:
        pass

    def submit(self, function: Callable[..., None], *args: Any) -> "Future[None]":
        future: Future[None] = Future()
        _do(future, function, args)
        return future


class _Late(_AtOnce):
    """What writes checkpoints, as if its thread did nothing before it is waited for."""

    def submit(self, function: Callable[..., None], *args: Any) -> "Future[None]":
        return _Waiting(function, args)


class _Waiting(Future[None]):
    def __init__(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        super().__init__()
        self._work = function, args

    def result(self, timeout: float | None = None) -> None:
        if not self.done():
            _do(self, *self._work)
        return super().result(timeout)


def _do(future: "Future[None]", function: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
