"""Two hosts within this machine: each has processes, a network and a name of its own, and one disk.

Hosts are namespaces without names, which the kernel takes away with the last process in them, and
that ends with whoever made the host, however that goes. So nothing can be left behind, and test
runs side by side cannot meet.
"""

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.jobs import children, is_alive
from tests.support.processes import REPOSITORY

_MAKE = ("unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_INTERFACE = "eth0"


class Host:
    """A host, until it is closed.

    Args:
        name: its host name.
        address: on the cable, once it is there.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        # The host's first process, with which all others of the host end. It ends when the pipe
        # that it reads does: also where this process is killed.
        self._maker = subprocess.Popen(
            [*_MAKE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            # `cat` answers once it is there, in namespaces that are made.
            assert self._maker.stdin is not None
            assert self._maker.stdout is not None
            assert self._maker.stderr is not None
            self._maker.stdin.write(b"here\n")
            self._maker.stdin.flush()
            if self._maker.stdout.readline() != b"here\n":
                raise OSError(self._maker.stderr.read().decode().strip())
            (self.pid,) = children(self._maker.pid)
            self.do("hostname", name)
            self.do("ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def do(self, *command: str) -> None:
        """Run a short command on this host.

        Raises:
            OSError: it failed.
        """
        done = subprocess.run(
            [*self._enter(), *command], capture_output=True, text=True, timeout=10, check=False
        )
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def start(
        self, command: list[str], output: Path, **environment: str
    ) -> "subprocess.Popen[bytes]":
        """Start a command on this host, with its output in a file."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            **environment,
        }
        with output.open("wb") as file:
            return subprocess.Popen(
                [*self._enter(), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """Return what runs on this host, besides what keeps it."""
        own = _namespace(self.pid)
        running = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
        return [
            pid for pid in running if pid != self.pid and _namespace(pid) == own and is_alive(pid)
        ]

    def connect(self, other: "Host") -> None:
        """Lay the cable to another host."""
        end = ("type", "veth", "peer", "name", _INTERFACE, "netns", str(other.pid))
        # In this host's network, but where process ids are those of this process.
        enter = ["nsenter", "--target", str(self.pid), "--net"]
        subprocess.run([*enter, "ip", "link", "add", _INTERFACE, *end], timeout=10, check=True)
        for host in (self, other):
            host.do("ip", "address", "add", f"{host.address}/24", "dev", _INTERFACE)
            host.do("ip", "link", "set", _INTERFACE, "up")

    def cut(self) -> None:
        """Cut this host's cable: what is sent is lost, and nobody is told."""
        self.do("ip", "link", "set", _INTERFACE, "down")

    def close(self) -> None:
        """Kill all that runs on this host; its network goes with it."""
        self._maker.kill()
        self._maker.communicate()

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--pid", "--mount"]


@contextmanager
def two_hosts() -> Generator[tuple[Host, Host]]:
    """Yield two hosts with a cable between them, and take them away in the end.

    Raises:
        OSError: this machine or this user cannot make them.
    """
    first = Host("host-a", "10.77.0.1")
    try:
        second = Host("host-b", "10.77.0.2")
        try:
            first.connect(second)
            yield first, second
        finally:
            second.close()
    finally:
        first.close()


def why_not() -> str:
    """Return why there can be no hosts here; "" where there can."""
    try:
        with two_hosts():
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot make hosts of namespaces: {error}"


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""
