"""Faults within a rank, at an instant of a place of its run.

A model's factory installs this in the rank that makes the model, wherever that was forked. A thread
of the rank waits for its place, sleeps for a part of the time that the place takes, and brings the
fault about if the rank is in that place still: both are looked at and done without letting the
rank's other threads have Python's lock, so a fault that is noted has hit its place. What was missed
is tried at the place's next turn, and then earlier in it.

A NaN is not an instant in time: it comes out of one of the computations of a place.
"""

import ctypes
import dataclasses
import fcntl
import functools
import json
import math
import mmap
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VARIABLE = "SYNCBN_TEST_FAULTS"
"""Names the file with the plan; without it, nothing is installed."""

FACTORY = f"{__name__}:make_probed"
PLACES = ("step", "checkpoint", "evaluation", "export", "publish")
FAULTS = ("SIGKILL", "SIGSEGV", "SIGSTOP", "cut network", "full disk", "NaN")

_SET_FLAGS = 0x8914  # SIOCSIFFLAGS
_RECORD = struct.Struct("=III d I")  # number, rank, turn, seconds in the place, whether there still
_MARKS_BYTES = 1 << 14
_CHUNKS_BYTES = (1 << 12, 1)


@dataclass(frozen=True)
class Instant:
    """When a fault comes about.

    Attributes:
        rank: in which rank.
        turn: how often the rank enters the place before; of a NaN, how often it computes there.
        fraction: after which part of the time that the place takes.
    """

    rank: int
    turn: int
    fraction: float


@dataclass(frozen=True)
class Hit:
    """A fault that came about.

    Attributes:
        rank: in which rank.
        turn: how often the rank had entered the place before, since it was started.
        after_s: since when it was in the place.
        is_sure: whether it was there still when the fault was complete.
    """

    rank: int
    turn: int
    after_s: float
    is_sure: bool


@dataclass(frozen=True)
class Plan:
    """What shall happen to a run, one after the other.

    Attributes:
        fault: one of `FAULTS`; "": none, but how long each place takes is written down.
        place: one of `PLACES`.
        instants: of each fault.
        typical_s: how long each rank's places take, by "rank place".
        interface: that the ranks' network goes by, which is cut.
        disk: the directory that is filled.
        missed: how often the next fault was missed by runs that had ended before.
    """

    fault: str
    place: str
    instants: list[Instant]
    typical_s: dict[str, float]
    interface: str = ""
    disk: str = ""
    missed: int = 0

    def write(self, file: Path) -> None:
        """Write this plan, of which nothing has happened yet, or which goes on."""
        file.write_text(json.dumps(dataclasses.asdict(self)))
        if not _marks_of(file).exists():
            _marks_of(file).write_bytes(bytes(_MARKS_BYTES))


def read_plan(file: Path) -> Plan:
    """Return a plan that was written."""
    values: dict[str, Any] = json.loads(file.read_text())
    values["instants"] = [Instant(**each) for each in values["instants"]]
    return Plan(**values)


def read_hits(file: Path) -> list[Hit]:
    """Return what has happened of a plan."""
    marks = _marks_of(file).read_bytes() if _marks_of(file).exists() else b""
    hits: list[Hit] = []
    for offset in range(0, len(marks) - _RECORD.size, _RECORD.size):
        number, rank, turn, after_s, is_sure = _RECORD.unpack_from(marks, offset)
        if not number:
            break
        hits.append(Hit(rank, turn, after_s, bool(is_sure)))
    return hits


def read_durations(file: Path) -> dict[str, float]:
    """Return the median of how long each rank's places took, by "rank place"."""
    found: dict[str, list[float]] = {}
    for line in Path(f"{file}.durations").read_text().splitlines():
        rank, place, duration_s = line.split()
        found.setdefault(f"{rank} {place}", []).append(float(duration_s))
    return {name: sorted(each)[len(each) // 2] for name, each in found.items()}


def make_probed(in_channels: int, num_classes: int) -> nn.Module:
    """Return a small model, and install what the plan says in this process."""
    _probe()
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
        _Passage(),
    )


@functools.cache
def _probe() -> "Probe | None":
    """Return the probe of this process, which is installed once; None if there is no plan."""
    if VARIABLE not in os.environ:
        return None
    probe = Probe(Path(os.environ[VARIABLE]), int(os.environ["RANK"]))
    probe.install()
    return probe


class _Passage(nn.Module):
    """Returns what it is given, or something that is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        probe = _probe()
        return x if probe is None else probe.spoil(x)


class Probe:
    """Where this rank is, and the fault that is its turn.

    Args:
        file: of the plan.
        rank: this rank.
    """

    def __init__(self, file: Path, rank: int) -> None:
        self._file = file
        self._rank = rank
        self._plan = plan = read_plan(file)
        with _marks_of(file).open("r+b") as marks:
            self._marks = mmap.mmap(marks.fileno(), _MARKS_BYTES)
        self._done = len(read_hits(file))
        left = plan.instants[self._done :]
        self._instant = left[0] if left and left[0].rank == rank else None
        self._depths: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._computed = 0
        self._came = threading.Event()
        self._chance = random.Random(f"{self._instant} {time.time()}")

    def install(self) -> None:
        """Have the places of this process noted, and the fault come about."""
        from syncbn.train import export, loop, step
        from syncbn.train.run.checkpoint import CheckpointWriter
        from syncbn.train.run.writer import Records

        def draw(run_path: Path) -> Path:
            (run_path / "curves.png").touch()
            return run_path / "curves.png"

        export.plot_curves = draw  # it would take longer than all the rest, and nothing reads it
        looping = loop._Loop  # pyright: ignore[reportPrivateUsage] -- where a place begins
        for owner, name, place in (
            (step.Stepper, "make", "step"),
            (Records, "write_checkpoint", "checkpoint"),
            (CheckpointWriter, "_write", "checkpoint"),
            (looping, "_evaluate", "evaluation"),
            (loop, "export", "export"),
            (export, "publish", "publish"),
        ):
            setattr(owner, name, self._noted(getattr(owner, name), place))
        if self._plan.fault == "NaN":
            looping._check = self._spoiling(looping._check)  # pyright: ignore[reportPrivateUsage]
        elif self._instant is not None:
            sys.setswitchinterval(1e-4)
            threading.Thread(target=self._throw, name="fault", daemon=True).start()

    def is_in(self, place: str) -> bool:
        """Return whether this rank is in a place, and in none within it."""
        depths = self._depths
        if place == "export":
            return depths["export"] > 0 and not depths["publish"]
        return depths[place] > 0 and (place != "evaluation" or not depths["export"])

    def spoil(self, x: Tensor) -> Tensor:
        """Return what a model has computed, or NaN: of the loss, or of its gradient alone."""
        plan, instant = self._plan, self._instant
        is_due = plan.fault == "NaN" and plan.place != "checkpoint" and self.is_in(plan.place)
        if instant is None or not is_due or not self._is_turn():
            return x
        self._note_hit(0.0)
        if plan.place == "step" and instant.fraction < 0.5:
            x.register_hook(lambda gradient: gradient * math.nan)
            return x
        return x * math.nan

    def _is_turn(self) -> bool:
        assert self._instant is not None
        self._computed += 1
        return self._computed == self._instant.turn + 1

    def _spoiling(self, check: Callable[..., None]) -> Callable[..., None]:
        """Return what looks at the weights before a checkpoint, one of which may be NaN by now."""

        @functools.wraps(check)
        def spoiling(loop: Any, metrics: dict[str, float]) -> None:
            instant = self._instant
            if self._plan.place == "checkpoint" and instant is not None and self._is_turn():
                self._note_hit(0.0)
                with torch.no_grad():
                    next(loop.training.model.parameters()).view(-1)[0] = math.nan
            check(loop, metrics)

        return spoiling

    def _noted(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self._within(place):
                return function(*args, **kwargs)

        return noted

    @contextmanager
    def _within(self, place: str) -> Generator[None]:
        since = time.perf_counter()
        self._depths[place] += 1
        if self.is_in(place):
            self._since[place] = since
            self._turns[place] += 1
            instant = self._instant
            if place == self._plan.place and instant and self._turns[place] > instant.turn:
                self._came.set()
        try:
            yield
        finally:
            self._depths[place] -= 1
            if not self._plan.fault:
                with Path(f"{self._file}.durations").open("a") as stream:
                    stream.write(f"{self._rank} {place} {time.perf_counter() - since}\n")

    def _throw(self) -> None:
        """Bring the fault about once the rank is where it shall, in a thread of its own."""
        plan, instant = self._plan, self._instant
        assert instant is not None
        typical_s = plan.typical_s.get(f"{self._rank} {plan.place}", 0.0)
        fraction = instant.fraction * 0.5**plan.missed
        act = self._act()
        while True:
            self._came.wait()
            self._came.clear()
            time.sleep(max(0.0, fraction * typical_s))
            if self.is_in(plan.place):
                act()
                return
            fraction *= self._chance.random()

    def _note_hit(self, after_s: float, is_sure: bool = True) -> None:
        place = self._plan.place
        record = (self._done + 1, self._rank, self._turns[place], after_s, is_sure)
        _RECORD.pack_into(self._marks, self._done * _RECORD.size, *record)

    def _act(self) -> Callable[[], None]:
        """Return what does the fault."""
        fault, own = self._plan.fault, os.getpid()
        place = self._plan.place
        if fault == "cut network":
            control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            down = struct.pack("16sh22x", self._plan.interface.encode(), 0)

            def cut() -> None:
                turn, after_s = self._turns[place], time.perf_counter() - self._since[place]
                fcntl.ioctl(control, _SET_FLAGS, down)
                self._note_hit(after_s, turn == self._turns[place] and self.is_in(place))

            return cut
        if fault == "full disk":
            filler = os.open(Path(self._plan.disk) / "filler", os.O_WRONLY | os.O_CREAT)

            def fill() -> None:
                turn, after_s = self._turns[place], time.perf_counter() - self._since[place]
                fill_disk(filler)
                self._note_hit(after_s, turn == self._turns[place] and self.is_in(place))

            return fill

        def hurt() -> None:
            self._note_hit(time.perf_counter() - self._since[place])
            if fault == "SIGSEGV":
                ctypes.string_at(0)  # reads from where nothing is
            os.kill(own, getattr(signal, fault))

        return hurt


def fill_disk(filler: int) -> None:
    """Write to a file until there is no room."""
    room = os.fstatvfs(filler)
    with suppress(OSError):  # in one call, and so at once
        os.posix_fallocate(filler, 0, room.f_bavail * room.f_frsize)
    os.lseek(filler, 0, os.SEEK_END)
    for size_bytes in _CHUNKS_BYTES:
        with suppress(OSError):
            while True:
                os.write(filler, bytes(size_bytes))


def _marks_of(file: Path) -> Path:
    return Path(f"{file}.marks")
