"""Programs of a batch system, called with a deadline and without the secrets of this process."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Done:
    """How a program ended.

    Attributes:
        code: its exit code.
        output: what it printed.
        error: what it said on standard error.
    """

    code: int
    output: str
    error: str


class Programs(Protocol):
    """Runs programs."""

    def __call__(self, command: Sequence[str], timeout_s: float) -> Done:
        """Run a program to its end.

        Raises:
            OSError: it cannot be started, or did not end in time and was killed: what it was about
                may have been done, and may still be.
        """
        ...


class SystemPrograms:
    """Runs programs of this machine.

    Args:
        environment: all their variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)

    def __call__(self, command: Sequence[str], timeout_s: float) -> Done:
        """Run a program, in a session of its own, so that Ctrl-C does not reach it."""
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no answer within {timeout_s:g} s") from error
        return Done(done.returncode, done.stdout, done.stderr)
