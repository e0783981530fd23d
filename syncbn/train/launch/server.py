"""The fork server: loads torch once, and forks a supervisor for each job that is asked for.

`python -m syncbn.train.launch.server DESCRIPTOR` accepts connections of a listening socket that it
inherits, and ends when its standard input ends; the supervisors do not. It has one thread, so that
no fork finds a lock held that nobody will release. What is asked and answered: `protocol.py`.
"""

import gc
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.launch.console import append_to, print_to
from syncbn.train.launch.permit import check_permit
from syncbn.train.launch.preload import preload, preload_for, preload_for_the_end
from syncbn.train.launch.protocol import Request, receive_request, send
from syncbn.train.launch.supervisor import supervise
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.lock import RunLock
from syncbn.train.schema import TrainConfig

# How long a client may take to send its request, during which nobody else is served.
_REQUEST_TIMEOUT_S = 5
_STDIN = 0
# A configuration, and the file that it was read of.
_Loaded = tuple[bytes, TrainConfig]


def main() -> None:
    """Serve until standard input ends."""
    preload()
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    path = Path(listener.getsockname())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel reaps supervisors
    gc.collect()
    gc.freeze()  # or the collections of each job would copy all that is shared with this process
    # After a freeze, what reading configurations leaves behind would be collected after hundreds of
    # them: it is after each, which looks at what is new alone.
    gc.disable()
    is_first = True
    while True:
        ready, _, _ = select.select([_STDIN, listener], [], [])
        if _STDIN in ready and not os.read(_STDIN, 1):
            _remove(path)
            return
        if listener in ready:
            with suppress(OSError):  # the client is gone
                connection, _ = listener.accept()
                with connection:
                    _serve(connection, listener, is_first)
                gc.collect(0)
                is_first = False


def _remove(path: Path) -> None:
    """Remove the socket and its directory, for a starter that could not."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _serve(connection: socket.socket, listener: socket.socket, is_first: bool) -> None:
    """Answer a request, or have a supervisor do it."""
    connection.settimeout(_REQUEST_TIMEOUT_S)
    files: list[int] = []
    try:
        request, files = receive_request(connection)
        loaded = _load(request, is_first)
        if os.fork() == 0:
            listener.close()
            connection.settimeout(None)
            _be_supervisor(connection, request, files, loaded)
    except Exception as error:  # nothing that is wrong with a request may end this process
        send(connection, error=f"{type(error).__name__}: {error}", is_wrong=False)
    finally:
        for file in files:
            os.close(file)


def _load(request: Request, is_first: bool) -> _Loaded | None:
    """Import what the job will, and return its configuration; None if it cannot be read.

    If it is not the first job, what is needed at its end too, of which the next ones will be glad.
    """
    run, loaded = RunDirectory(Path(request.run_dir)), None
    with suppress(SyncBNError, OSError):  # of which the supervisor will speak
        text = run.config_file.read_bytes()
        loaded = text, run.read_config()
        preload_for(loaded[1])
    if not is_first:
        preload_for_the_end()
    return loaded


def _unless_changed(run: RunDirectory, loaded: _Loaded | None) -> TrainConfig | None:
    """Return a configuration that was read before the run was locked, if it holds still."""
    if loaded is None or run.config_file.read_bytes() != loaded[0]:
        return None
    return loaded[1]


def _be_supervisor(
    connection: socket.socket, request: Request, files: list[int], loaded: _Loaded | None
) -> NoReturn:
    """Be the supervisor of a job, in a process that was just forked, and end it."""
    gc.enable()
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        run = RunDirectory(Path(request.run_dir))
        if request.console is None:
            lock = RunLock(files[0])
            print_to(*files[1:])
        else:
            lock = run.lock()
            if request.permit is not None:
                check_permit(*request.permit)
            append_to(request.console, request.header)
        os.chdir(request.cwd)
        for name in request.unset:
            os.environ.pop(name, None)
        os.environ.update(request.environment)
        if request.cores is not None:
            os.sched_setaffinity(0, request.cores)
        with suppress(OSError):  # whoever asked is gone, and finds the job by its lock
            send(connection, pid=os.getpid())
        if request.console is None:
            code = supervise(run, lock, connection, _unless_changed(run, loaded))
            send(connection, exit_code=code)
        else:
            connection.close()
            code = supervise(run, lock, config=_unless_changed(run, loaded))
    except Exception as error:
        if not isinstance(error, SyncBNError | OSError):
            traceback.print_exc()
        with suppress(OSError):
            send(connection, error=str(error), is_wrong=isinstance(error, ConfigError))
    finally:
        with suppress(OSError):  # a full disk, or a pipe that nobody reads
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
