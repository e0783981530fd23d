"""What is said between a fork server, whoever asks it for a supervisor, and that supervisor.

A connection is for one job: a request, with open files in it; an answer, once the supervisor has
the lock of the run, {"pid"}, or {"error", "is_wrong"}; and to the launcher of a job that shall end
with it, {"exit_code"} when the job has ended. Each is one JSON object in one line.
"""

import dataclasses
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LIMIT_BYTES = 1 << 22
_CHUNK_BYTES = 1 << 16
_FILES = 3


@dataclass(frozen=True)
class Request:
    """A job, and what its processes get.

    Attributes:
        run_dir: the directory of its run, with a configuration; absolute.
        cwd: in which directory they run.
        console: the file that gets what they print, at its end; None: the job ends with its
            launcher, and the request brings the lock of the run, and standard output and error.
        header: the line that is written there first; "": none.
        environment: variables that are set.
        unset: variables that are not.
        cores: the processor cores that they may use; None: all that the server may.
        permit: a file and what it must say once the supervisor has the lock, or else its time is
            over; None: it needs none.
    """

    run_dir: str
    cwd: str
    console: str | None = None
    header: str = ""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    unset: Sequence[str] = ()
    cores: Sequence[int] | None = None
    permit: tuple[str, str] | None = None


def send_request(connection: socket.socket, request: Request, files: Sequence[int]) -> None:
    """Send a request, and descriptors of the files that it brings."""
    line = _encode(dataclasses.asdict(request))
    sent = socket.send_fds(connection, [line], files) if files else connection.send(line)
    connection.sendall(line[sent:])


def receive_request(connection: socket.socket) -> tuple[Request, list[int]]:
    """Return what `send_request` sent, the descriptors to be closed by the caller.

    Raises:
        OSError: the other end is gone, or takes too long.
        TypeError, ValueError: it is not a request.
    """
    line, files, _, _ = socket.recv_fds(connection, _CHUNK_BYTES, _FILES)
    return Request(**json.loads(_rest(connection, line))), files


def send(connection: socket.socket, **values: Any) -> None:
    """Send an answer."""
    connection.sendall(_encode(values))


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next answer; None if the other end is gone.

    Raises:
        TimeoutError: it does not come in the time that the connection was given.
    """
    line = b""
    try:  # byte by byte, as the next answer may follow at once
        while (part := connection.recv(1)) and part != b"\n":
            line += part
    except ConnectionError:
        return None
    return json.loads(line) if part else None


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _rest(connection: socket.socket, line: bytes) -> bytes:
    """Return the whole of a line that has begun."""
    while not line.endswith(b"\n"):
        part = connection.recv(_CHUNK_BYTES)
        if not part or len(line) > _LIMIT_BYTES:
            raise ValueError("a request was cut short, or is too long")
        line += part
    return line
