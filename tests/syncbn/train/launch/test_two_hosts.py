"""A job of two hosts is one job, and ends on both where they cannot reach each other any more."""

import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from syncbn.train.run.checkpoint import read_newest
from syncbn.train.run.directory import RunDirectory
from tests.support.hosts import Host, two_hosts
from tests.support.jobs import SMALL, Job, outcome, wait_until
from tests.support.processes import TRAIN

JOB = (*SMALL, "epochs=3", "log_every_steps=1", "checkpoint.every_steps=10")
TIMEOUT_S = 6
# What ranks take, after their own time-out, to find out who is missing, and torchrun to end.
ENDING_S = 45

Hosts = tuple[Host, Host]

# Both start torchrun on each host, and wait for what it finds out by its time-outs.
pytestmark = pytest.mark.long


@pytest.fixture
def hosts() -> Generator[Hosts]:
    with ExitStack() as made:
        try:
            pair = made.enter_context(two_hosts())
        except OSError as error:
            pytest.skip(f"cannot make hosts of namespaces: {error}")
        yield pair


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job comes to as two ranks of one host."""
    job = Job(tmp_path_factory.mktemp("one-host") / "run", *JOB, "launch.nproc=2")
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    return outcome(job.run)


def _start(hosts: Hosts, run_dir: Path, elastic: bool, *overrides: str) -> list[Any]:
    """Start torchrun with one rank on each host; its output is beside the run's directory."""
    first = hosts[0].address
    started: list[subprocess.Popen[bytes]] = []
    for number, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nnodes=2", "--nproc-per-node=1", f"--local-addr={host.address}"]
        if elastic:
            # Told who is the host, as torchrun would have to resolve names to find out.
            torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", "--rdzv-id=job"]
            torchrun += [f"--rdzv-conf=is_host={int(number == 0)}"]
        else:
            torchrun += [f"--node-rank={number}", f"--master-addr={first}", "--master-port=29400"]
        command = [*torchrun, TRAIN[1], f"run_dir={run_dir}", *JOB, *overrides]
        started.append(host.start(command, _output(run_dir, host)))
    return started


def _output(run_dir: Path, host: Host) -> Path:
    return run_dir.parent.with_name(f"{host.name}.out")


def test_job_of_two_hosts_is_the_same_job_to_the_bit(
    hosts: Hosts, on_one_host: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "shared" / "run"
    started = _start(hosts, run_dir, True)
    codes = [each.wait(90) for each in started]
    said = "".join(_output(run_dir, host).read_text() for host in hosts)
    assert codes == [0, 0], said
    assert [entry.name for entry in run_dir.parent.iterdir()] == ["run"]
    run = RunDirectory(run_dir)
    assert outcome(run) == on_one_host
    assert re.findall(r"epoch (\d)/3", run.log_file.read_text()) == ["1", "2", "3"]
    assert said.count("finished after 3 epochs") == 1
    assert [host.processes() for host in hosts] == [[], []]
    # Each step's gradients and more went over the cable, and not through the machine's memory.
    steps, size = len(on_one_host["steps"]), len(on_one_host["bundle"])
    assert min(host.sent_bytes() for host in hosts) > steps * size


def test_cut_cable_ends_both_hosts_with_a_reason_and_a_checkpoint(
    hosts: Hosts, on_one_host: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "shared" / "run"
    run = RunDirectory(run_dir)
    # Not elastic: that one's torchrun asks the other host every second whether there are more, and
    # hangs for a quarter of an hour, until the kernel gives up, where that is gone (torch 2.14).
    started = _start(hosts, run_dir, False, f"launch.timeout_s={TIMEOUT_S}")
    wait_until(lambda: run.steps_file.exists() and run.steps_file.read_text().count("\n") >= 25)
    hosts[1].cut_cable()
    cut_at = time.monotonic()
    wait_until(lambda: all(each.poll() is not None for each in started), TIMEOUT_S + ENDING_S)
    said = [_output(run_dir, host).read_text() for host in hosts]
    assert [each.returncode for each in started] == [1, 1], said
    assert time.monotonic() - cut_at > TIMEOUT_S / 2  # for a reason, and not by themselves
    assert "rank 0 gave up waiting: rank 1 is gone" in said[0]
    assert re.search("rank 1 gave up waiting: .*rank 0.* has not answered", said[1])
    assert [host.processes() for host in hosts] == [[], []]
    result = run.read_result()
    assert result is not None
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("rank 1 is gone")
    newest = read_newest(run.checkpoints_dir)
    assert newest is not None
    assert newest.position.step >= 10
    job = Job(run_dir, *JOB, "launch.nproc=2")
    assert job.wait() == 0, Path(f"{run_dir}.out").read_text()
    assert outcome(run) == on_one_host
