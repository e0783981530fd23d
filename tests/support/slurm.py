"""A real Slurm on this machine: munged, slurmctld and two slurmds, in one directory, as this user.

All of them listen on free ports, know each other by a key of their own, and end with this process.
"""

import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
_START_TIMEOUT_S = 60
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# The second node, which comes after this machine in all lists: a slurmd under another name.
_SECOND = "zz-second"
_ANOTHER_HOST = (
    *("unshare", "--uts", "--mount", "sh", "-c"),
    'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"',
    "sh",
)

# Cores are of this machine twice, once for each node, and need not be there.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
KillWait=5
MessageTimeout=5
MinJobAge=60
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 RealMemory=1000
NodeName={second} NodeHostname={second} NodeAddr=127.0.0.2 Port={second_port} CPUs=4 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of two nodes, until it is closed.

    Args:
        directory: for its files; short enough for the name of a socket.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "slurm.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_up = False
        (directory / "state").mkdir()
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = _free_ports(3)
        self.file.write_text(
            _CONFIGURATION.format(
                directory=directory,
                host=socket.gethostname(),
                user=getpass.getuser(),
                controller_port=ports[0],
                first_port=ports[1],
                second_port=ports[2],
                second=_SECOND,
            )
        )
        try:
            self._start("munged", "--foreground", "--force", *self._munge_files(key))
            self._wait_for((directory / "munge.socket").exists)
            self.start_controller()
            names = directory / "hosts"
            names.write_text(f"127.0.0.1 localhost {socket.gethostname()}\n127.0.0.2 {_SECOND}\n")
            slurmd = ("slurmd", "-D", "-f", str(self.file))
            self._start(*slurmd)
            self._start(*_ANOTHER_HOST, str(names), _SECOND, *slurmd)
            self._wait_for(self._is_ready)
            self._is_up = True
        except BaseException:
            self.close()
            raise

    @property
    def variables(self) -> dict[str, str]:
        """Where its commands are, and what they talk to."""
        return {"PATH": _PATH, "SLURM_CONF": str(self.file)}

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need."""
        return {**os.environ, **self.variables}

    def queue(self) -> list[str]:
        """Return what is in its queue: number, name and state of each job."""
        return self.ask("squeue", "--noheader", "--format=%i|%j|%T").splitlines()

    def ask(self, *command: str) -> str:
        """Run one of its commands and return the output."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def start_controller(self) -> None:
        """Start slurmctld, which goes on where it was stopped."""
        self._start("slurmctld", "-D", "-f", str(self.file))

    def stop_controller(self) -> None:
        """Kill slurmctld; jobs go on."""
        process = self._processes.pop("slurmctld")
        process.kill()
        process.wait()

    def clear(self) -> None:
        """Kill all jobs."""
        self.ask("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        self._wait_for(lambda: not self.queue())

    def close(self) -> None:
        """End all jobs, and all of it."""
        try:
            if self._is_up:
                self.clear()
        finally:
            self._end()

    def _end(self) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _munge_files(self, key: Path) -> list[str]:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.directory}/munge.{end}" for name, end in files.items()]
        return [*options, f"--key-file={key}"]

    def _start(self, program: str, *arguments: str) -> None:
        name = program if program not in self._processes else f"{program} {len(self._processes)}"
        found = shutil.which(program, path=_PATH)
        assert found is not None
        with (self.directory / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [found, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _is_ready(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.split() == ["idle", "2"]

    def _wait_for(self, condition: object) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        assert callable(condition)
        while not condition():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} has ended\n{self._logs()}"
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.05)

    def _logs(self) -> str:
        files = sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)


def why_no_slurm() -> str:
    """Return why there cannot be one here; empty if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(missing)} (slurm-wlm, munge)" if missing else ""


@contextmanager
def slurm(directory: Path) -> Generator[Slurm]:
    """Yield a cluster, and end it."""
    with ExitStack() as made:
        cluster = Slurm(directory)
        made.callback(cluster.close)
        yield cluster


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [
            opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
