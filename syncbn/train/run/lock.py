"""The lock of a run directory: of one job, from before it writes to after its last process."""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from syncbn.errors import ConfigError

LOCK_FILE = ".lock"
# A predecessor that was told to end may hold the lock for a moment.
_TIMEOUT_S = 5
_POLL_S = 0.05


class RunLock:
    """A lock that processes share by a file descriptor, and the kernel gives back.

    It belongs to the descriptor's open file, so the launcher can hand it to the supervisor, and the
    supervisor to its ranks, without a moment in which it is free. It is free when all of them have
    closed it or have ended, in whatever way.

    Args:
        descriptor: of the locked file, which this closes.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        """Return the descriptor, for another process."""
        assert self._descriptor is not None
        return self._descriptor

    def close(self) -> None:
        """Give up this process's part of the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def keep_from_children(self) -> None:
        """Have processes that this one forks from now on close it, as they may outlast the job."""
        os.register_at_fork(after_in_child=self.close)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def lock_directory(path: Path) -> RunLock:
    """Return the lock of a run directory, for which a predecessor may be waited for seconds.

    Raises:
        ConfigError: another job is in the directory.
        OSError: the file system has no locks, or the directory cannot be written to.
    """
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while not _try(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another job is training in {path}; wait for its end, or choose another "
                    "run_dir"
                )
            time.sleep(_POLL_S)
    except BaseException:
        os.close(descriptor)
        raise
    return RunLock(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
