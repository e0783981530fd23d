"""The dispatcher of jobs as a child of the command, started again whenever it ends."""

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from service.settings import Settings

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# One that ran for so long was well, and is started again at once if it ends.
_WELL_S = 60.0
_END_TIMEOUT_S = 10.0
_LINE_LIMIT = 2000
_LOGGED = re.compile(r"[\d-]{10} [\d:,]+ (?P<level>INFO|WARNING|ERROR|CRITICAL) (?P<text>.*)")


def command_of(settings: Settings) -> list[str]:
    """Return the command of a dispatcher that ends when its standard input does."""
    command = [sys.executable, "-m", "syncbn.jobs.dispatch.command", str(settings.jobs)]
    command += ["--models", str(settings.models), "--until-stdin-closes"]
    for option, value in (
        ("--cores", settings.dispatcher_cores),
        ("--gpus", settings.dispatcher_gpus),
        ("--engine", settings.dispatcher_engine),
    ):
        if value is not None:
            command += [option, str(value)]
    return command


class DispatcherChild:
    """A process that dispatches jobs, for as long as this one lives.

    It ends when the pipe to its standard input is closed, be it by the kernel after a SIGKILL of
    this process. What it says is logged.

    Args:
        command: starts it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="dispatcher", daemon=True)

    def __enter__(self) -> "DispatcherChild":
        """Start it, and keep it alive."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tell(self) -> None:
        """Have it end, without waiting for that; the jobs go on."""
        self._ended.set()
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def close(self) -> None:
        """End it, if that has not happened, and wait until it has; the jobs go on."""
        self.tell()
        process = self._process
        if process is None:
            return
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the dispatcher did not end within %g s, and is killed", _END_TIMEOUT_S)
            process.kill()
            process.wait(_END_TIMEOUT_S)
        self._thread.join(_END_TIMEOUT_S)

    def _keep(self) -> None:
        pause_s, told = _FIRST_PAUSE_S, ""
        while not self._ended.is_set():
            started_s = time.monotonic()
            last = self._run(told)
            if self._ended.is_set():
                return
            if time.monotonic() - started_s > _WELL_S:
                pause_s = _FIRST_PAUSE_S
            # Another one that has the store may have it for days.
            if last != told:
                log.error("the dispatcher of jobs ended: %s; it is started again", last)
                told = last
            self._ended.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _run(self, told: str) -> str:
        """Run it once; return its last line.

        Args:
            told: how it ended before, which need not be logged again.
        """
        with self._lock:
            if self._ended.is_set():
                return ""
            try:
                self._process = process = subprocess.Popen(  # noqa: S603 -- our own command
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for this process, which ends that one.
                    start_new_session=True,
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}"
        assert process.stdout is not None
        last = ""
        with process.stdout as lines:
            while line := lines.readline(_LINE_LIMIT):
                last = line.decode(errors="replace").rstrip()
                if last and last != told:
                    _log(last)
        code = process.wait()
        with self._lock:
            if process.stdin is not None:
                process.stdin.close()
        return last or f"it said nothing, and ended with code {code}"


def _log(line: str) -> None:
    """Log a line as it was logged there."""
    found = _LOGGED.fullmatch(line)
    level, text = (found["level"], found["text"]) if found else ("INFO", line)
    log.log(logging.getLevelNamesMapping()[level], "%s", text)
