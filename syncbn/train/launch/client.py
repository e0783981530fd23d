"""How jobs are started: by a fork server, of one's own or of the sweep that one belongs to.

Imports no torch.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from syncbn.errors import ConfigError, TrainingError
from syncbn.train.launch.protocol import Request, receive, send_request
from syncbn.train.run.lock import RunLock

VARIABLE = "SYNCBN_FORK_SERVER"
"""Names the socket of the server that the jobs of a sweep share."""

# How long a server may take to load torch, on a machine with much else to do, and a supervisor to
# wait for the lock of a run.
_ANSWER_TIMEOUT_S = 300
_CLOSE_TIMEOUT_S = 5
# Threads of numpy, which would be there before the first fork.
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1"}


class ForkServer:
    """A process that has loaded torch, and forks a supervisor for each job.

    It is started when it is first needed, started again if it has died, and ends with this
    process. Its supervisors outlive both.

    Args:
        environment: all variables of the server, and so of every job; None: those of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._lock = threading.Lock()

    def start(
        self,
        run_dir: Path,
        console: Path,
        environment: Mapping[str, str],
        unset: Sequence[str] = (),
        cores: Sequence[int] | None = None,
        header: str = "",
        permit: tuple[Path, str] | None = None,
    ) -> int:
        """Go on with a run, in processes that outlive this one.

        Args:
            run_dir: the directory of the run, with a configuration, and locked by nobody.
            console: gets what the job prints, at its end.
            environment: variables that its processes have besides those of this process.
            unset: variables that they do not have.
            cores: the processor cores that they may use; None: all.
            header: a line that is written to the console first.
            permit: a file, and what it must say once the supervisor has the lock of the run, or
                else it does not begin; None: it needs none.

        Returns:
            The process of the supervisor, which has the lock.

        Raises:
            ConfigError: another job is in the directory, or the permit says otherwise.
            TrainingError: no supervisor could be started.
        """
        request = Request(
            *(str(run_dir.resolve()), str(Path.cwd()), str(console.resolve()), header),
            *(dict(environment), list(unset), None if cores is None else list(cores)),
            permit=None if permit is None else (str(permit[0]), permit[1]),
        )
        connection, pid = self._ask(request)
        connection.close()
        return pid

    def launch(self, run_dir: Path, lock: RunLock) -> "Launched":
        """Go on with a run, in processes that end with this one.

        They print to the standard output and error of this process, and have its environment.

        Args:
            run_dir: the directory of the run, with a configuration.
            lock: of the directory, in which the supervisor gets a part.

        Raises:
            TrainingError: no supervisor could be started.
        """
        request = Request(str(run_dir.resolve()), str(Path.cwd()), environment=dict(os.environ))
        return Launched(*self._ask(request, lock.fileno(), 1, 2))

    def share(self) -> None:
        """Have the processes that this one starts use this server, and start it."""
        with self._lock:
            os.environ[VARIABLE] = self._start_server()

    def warm(self) -> None:
        """Start the server, which loads torch while nobody waits for it."""
        with self._lock:
            self._start_server()

    def close(self) -> None:
        """End the server, but none of its supervisors."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()
                try:
                    process.wait(_CLOSE_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if self._directory is not None:
                if os.environ.get(VARIABLE) == str(self._directory / "socket"):
                    del os.environ[VARIABLE]
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: Request, *files: int) -> tuple[socket.socket, int]:
        """Return the connection to a supervisor that has begun, and its pid."""
        for _ in range(2):  # a server may have died since
            connection = self._connect()
            connection.settimeout(_ANSWER_TIMEOUT_S)
            try:
                send_request(connection, request, files)
                answer = receive(connection)
            except ConnectionError:
                answer = None
            except TimeoutError:
                connection.close()
                self._give_up_server()
                raise TrainingError(
                    f"the fork server did not answer within {_ANSWER_TIMEOUT_S} s; look at what "
                    "else the machine does"
                ) from None
            if answer is not None and "pid" in answer:
                return connection, answer["pid"]
            connection.close()
            if answer is not None:
                raise (ConfigError if answer["is_wrong"] else TrainingError)(answer["error"])
        raise TrainingError(
            "the fork server, or the supervisor that it started, has died twice; what it printed "
            "says why, and if it printed nothing, the machine may have no memory left"
        )

    def _connect(self) -> socket.socket:
        """Return a connection to the server of this sweep, or else to one of this process."""
        if VARIABLE in os.environ:
            with suppress(OSError):  # its process is gone, or on another host
                return _connect_to(os.environ[VARIABLE])
        with self._lock:
            return _connect_to(self._start_server())

    def _give_up_server(self) -> None:
        """Kill this process's server, so that the next job need not wait for one that hangs."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _variables(self) -> Mapping[str, str]:
        return os.environ if self._environment is None else self._environment

    def _start_server(self) -> str:
        """Return the path of this process's server, which is started if it does not run."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="syncbn-"))
        path = self._directory / "socket"
        if self._process is None or self._process.poll() is not None:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(128)
                # In a session of its own, so that Ctrl-C reaches this process alone.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "syncbn.train.launch.server", str(listener.fileno())],
                    env={**self._variables(), **_SINGLE_THREADED},
                    stdin=subprocess.PIPE,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
        return str(path)


class Launched:
    """A job whose supervisor ends with this process.

    Args:
        connection: to the supervisor, which stops the job when it is closed.
        pid: the supervisor's.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self.pid = pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the supervisor's exit code, negative if it was killed; None: it has not ended."""
        self._connection.settimeout(timeout_s)
        try:
            answer = receive(self._connection)
        except TimeoutError:
            return None
        return -signal.SIGKILL if answer is None else answer.get("exit_code", 1)

    def stop(self) -> None:
        """Have the ranks write their state and end."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Kill the supervisor, with which its ranks end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop the job, if it has not ended, without waiting for it."""
        self._connection.close()


def _connect_to(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
