"""The lock that makes a dispatcher the only one of its store, and says who it is."""

import fcntl
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from syncbn.errors import JobError

_FILE = "dispatcher.lock"


class Claim:
    """A store that this process alone dispatches, until it closes it or ends.

    Args:
        directory: of the store.
        engine: where jobs are run, for others to read.

    Raises:
        JobError: another dispatcher has it; the message says which.
    """

    def __init__(self, directory: Path, engine: str) -> None:
        file = directory / _FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobError(f"cannot use {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 1000).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise JobError(
                f"{directory} has a dispatcher already: {holder or 'it does not say which'}; end "
                "that one first, or use another directory"
            ) from error
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        text = f"process {os.getpid()} on {platform.node()}, engine {engine}, since {since}\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def close(self) -> None:
        """Let another dispatcher have the store."""
        os.close(self._descriptor)
