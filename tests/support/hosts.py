"""Two hosts within this machine: each has processes, a network and a name of its own, and one disk.

Hosts are namespaces without names, which the kernel takes away with the last process in them, and
that ends with whoever made the host, however that goes. So nothing can be left behind, and test
runs side by side cannot meet.
"""

import os
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.jobs import children, is_alive

_MAKE = ("unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# The first process of a host, with which all others end: it does as soon as nobody holds the other
# end of its standard input, so also where the test is killed.
_STAY = ("sh", "-c", "echo here && exec cat")
INTERFACE = "eth0"


class Host:
    """A host, until it is closed.

    Args:
        name: its host name.
        address: on the cable, once it is there.

    Raises:
        OSError: this machine or this user cannot make one.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._started: list[subprocess.Popen[bytes]] = []
        self._maker = subprocess.Popen(
            [*_MAKE, *_STAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert self._maker.stdout is not None
            assert self._maker.stderr is not None
            if not self._maker.stdout.readline():
                raise OSError(self._maker.stderr.read().decode().strip())
            (self._first,) = children(self._maker.pid)
            _do([*self.inside(), "hostname", name])
            _do([*self.inside(), "ip", "link", "set", "lo", "up"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill all that runs on this host; its network goes with it."""
        self._maker.kill()
        self._maker.communicate()
        for process in self._started:
            process.wait()

    def connect(self, other: "Host") -> None:
        """Lay a cable to another host."""
        end = f"type veth peer name {INTERFACE} netns {other._first}".split()
        # In this host's network, but where processes have the numbers that they have here.
        _do([*self.inside("--net"), "ip", "link", "add", INTERFACE, *end])
        for host in (self, other):
            address = ("address", "add", f"{host.address}/24", "dev", INTERFACE)
            _do([*host.inside(), "ip", *address])
            _do([*host.inside(), "ip", "link", "set", INTERFACE, "up"])

    def cut_cable(self) -> None:
        """Cut the cable: what is sent is lost, and nobody is told."""
        _do([*self.inside(), "ip", "link", "set", INTERFACE, "down"])

    def sent_bytes(self) -> int:
        """Return how much this host has sent over the cable."""
        lines = Path(f"/proc/{self._first}/net/dev").read_text().splitlines()
        (counts,) = [line.split(":")[1] for line in lines if line.strip().startswith(INTERFACE)]
        return int(counts.split()[8])

    def start(self, command: list[str], output: Path) -> "subprocess.Popen[bytes]":
        """Start a command on this host, with its output in a file."""
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*self.inside(), *command],
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def processes(self) -> list[str]:
        """Return the commands of what runs on this host."""
        own = _namespace(self._first)
        running = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [
            Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            for pid in running
            if pid != self._first and _namespace(pid) == own and is_alive(pid)
        ]

    def inside(self, *namespaces: str) -> list[str]:
        """Return what a command is prefixed with to run on this host."""
        of_all = ("--net", "--uts", "--pid", "--mount")
        return ["nsenter", "--target", str(self._first), *(namespaces or of_all)]


@contextmanager
def two_hosts() -> Generator[tuple[Host, Host]]:
    """Yield two hosts with a cable between them, and take them away in the end.

    Raises:
        OSError: this machine or this user cannot make them; the text says why.
    """
    with ExitStack() as made:
        first = Host("host-a", "10.77.0.1")
        made.callback(first.close)
        second = Host("host-b", "10.77.0.2")
        made.callback(second.close)
        first.connect(second)
        yield first, second


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""
