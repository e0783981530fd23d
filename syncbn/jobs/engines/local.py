"""Runs jobs on this machine: a process forked for each, which outlives the dispatcher."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from syncbn.errors import EngineError, SyncBNError
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.workspace import Workspace
from syncbn.train.launch.client import ForkServer


class LocalEngine:
    """Forks a supervisor for each attempt, which has the lock of the run as long as it lives.

    What it knows of an attempt is that lock, so that nothing is lost with this process.

    Args:
        environment: of all jobs.
    """

    name = "local"
    has_own_queue = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._server = ForkServer(environment)
        self._server.warm()

    def start(self, attempt: Attempt) -> str:
        """Have the fork server start a supervisor, unless there is one; return its process."""
        workspace = Workspace(attempt.directory)
        if workspace.is_held():
            return ""
        gpus = ",".join(map(str, attempt.gpus))
        threads = max(1, len(attempt.cores) // attempt.nproc)
        try:
            pid = self._server.start(
                workspace.run.path,
                console=workspace.console,
                environment={"CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": str(threads)},
                cores=attempt.cores,
                header=workspace.header(attempt.number),
                permit=workspace.permit(attempt.number),
            )
        except (SyncBNError, OSError) as error:
            raise EngineError(f"attempt {attempt.name} was not started: {error}") from error
        return str(pid)

    def observe(self, attempts: Sequence[Attempt]) -> dict[str, Presence]:
        """Return whether somebody has the lock of each run."""
        return {attempt.job: self._presence(attempt) for attempt in attempts}

    def explain(self, attempt: Attempt) -> str:
        """Return nothing: who ended a process is not known here."""
        return ""

    def stop(self, attempt: Attempt) -> None:
        """Send SIGTERM to the supervisor, which passes it on."""
        self._signal(attempt, signal.SIGTERM)

    def kill(self, attempt: Attempt) -> None:
        """Send SIGKILL to the supervisor and its ranks."""
        self._signal(attempt, signal.SIGKILL)

    def close(self) -> None:
        """End the fork server; supervisors go on."""
        self._server.close()

    def _presence(self, attempt: Attempt) -> Presence:
        try:
            is_held = Workspace(attempt.directory).is_held()
        except OSError:
            return Presence.unknown
        return Presence.alive if is_held else Presence.gone

    def _signal(self, attempt: Attempt, number: signal.Signals) -> None:
        """Signal the processes of an attempt: those that have the lock, whatever their numbers.

        A process that merely got the number of one that ended has not got the lock.
        """
        holders = Workspace(attempt.directory).holders()
        if number == signal.SIGTERM and attempt.handle.isdigit():
            supervisor = int(attempt.handle)
            # Ranks that have lost theirs do not know how to stop in order.
            holders = [supervisor] if supervisor in holders else holders
        for process in holders:
            with suppress(ProcessLookupError):
                try:
                    os.kill(process, number)
                except PermissionError as error:
                    raise EngineError(
                        f"process {process} of job {attempt.job} is another user's: run the "
                        "dispatcher as the user that started it"
                    ) from error
