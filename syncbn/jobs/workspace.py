"""The directory of one job: which attempt may run, whether one does, and its files."""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from syncbn.train.launch.console import header
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.lock import LOCK_FILE

ARRAYS = "arrays"
"""Below the store: links to the logs of jobs that a cluster has as the tasks of one array."""

_PERMIT = "attempt"
_WITHDRAWN = "attempt.withdrawn"


@dataclass(frozen=True)
class Workspace:
    """The directory of one job."""

    directory: Path

    @classmethod
    def of_job(cls, root: Path, job: str) -> "Workspace":
        """Return that of a job.

        Args:
            root: of the store.
            job: its identifier.
        """
        return cls(root / "work" / job)

    @property
    def run(self) -> RunDirectory:
        """What the trainer writes."""
        return RunDirectory(self.directory / "run")

    @property
    def console(self) -> Path:
        """What the processes of all attempts printed."""
        return self.directory / "console.log"

    def header(self, attempt: int) -> str:
        """Return the line of the console that begins an attempt."""
        return header(attempt)

    def permit(self, attempt: int) -> tuple[Path, str]:
        """Return the file that says which attempt may run, and what it says of this one.

        The attempt looks there once it has the lock of the run. Whoever takes the permit away
        looks at the lock afterwards: so either finds the other.
        """
        return self.directory / _PERMIT, f"{attempt}\n"

    def allow(self, attempt: int) -> None:
        """Write which attempt may run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f"{_PERMIT}.tmp"
        with temporary.open("w") as stream:
            stream.write(self.permit(attempt)[1])
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.directory / _PERMIT)

    def revoke(self) -> None:
        """Take the permit away, which needs no room on the disk."""
        with suppress(FileNotFoundError):
            (self.directory / _PERMIT).replace(self.directory / _WITHDRAWN)

    def allowed(self) -> int:
        """Return which attempt may run; 0: none."""
        return _read_number(self.directory / _PERMIT)

    def prepared(self) -> int:
        """Return which attempt may run, or might last; 0: none ever.

        What lies in the directory of the run is of that attempt, or of one before it.
        """
        return self.allowed() or _read_number(self.directory / _WITHDRAWN)

    def is_held(self) -> bool:
        """Return whether a process has the lock of the run."""
        try:
            descriptor = os.open(self.run.path / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            # Shared, so that two who look do not take each other for a job.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def holders(self) -> list[int]:
        """Return the processes of this machine that have the lock of the run open."""
        file = os.path.realpath(self.run.path / LOCK_FILE)
        found: list[int] = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            with suppress(OSError):  # it has ended, or is another user's
                if any(str(each.readlink()) == file for each in (process / "fd").iterdir()):
                    found.append(int(process.name))
        return found


def _read_number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
