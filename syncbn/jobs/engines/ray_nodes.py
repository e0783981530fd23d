"""Starts a torchrun on each of several machines of a Ray cluster, and stops them together.

`python -m syncbn.jobs.engines.ray_nodes --nodes N --ranks R --cores C --gpus G -- COMMAND…` is what
Ray runs as a job. It waits until N machines have C cores and G GPUs for it, each, and has COMMAND,
which is `syncbn.train.launch.batch`, run on each of them. SIGTERM is passed on.
"""

import argparse
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

# What torchrun may take, when told to stop: it gives its ranks 30 s.
_STOP_S = 50
_POLL_S = 0.5


class Machine:
    """A part of one machine; lives there as an actor of Ray."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> tuple[str, int]:
        """Return an address of this machine, and a port that is free there."""
        ray = _ray()
        with socket.create_server(("", 0)) as free:
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: list[str]) -> int:
        """Run a command to its end, and return its exit code."""
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return self._process.wait()

    def stop(self) -> None:
        """Tell the command to stop."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def main() -> int:
    """Run a command on each machine, and return the highest exit code."""
    options = _parser().parse_args()
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    ray = _ray()
    ray.init(address="auto", log_to_driver=False)
    needs: dict[str, float] = {"CPU": options.cores}
    if options.gpus:
        needs["GPU"] = options.gpus
    group = ray.util.placement_group([needs] * options.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())  # as long as that takes: SIGTERM ends this process, and all is well
    signal.signal(signal.SIGTERM, note)
    # One thread runs the command, and one tells it to stop.
    actor = ray.remote(Machine)
    in_group = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    machines = [
        actor.options(
            num_cpus=options.cores,
            num_gpus=options.gpus,
            max_concurrency=2,
            scheduling_strategy=in_group(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(options.nodes)
    ]
    address, port = ray.get(machines[0].place.remote())
    running = [
        machine.run.remote(
            [
                *options.command,
                *("--nodes", str(options.nodes), "--node-rank", str(index)),
                *("--ranks", str(options.ranks)),
                *("--master-addr", address, "--master-port", str(port)),
            ]
        )
        for index, machine in enumerate(machines)
    ]
    return _wait(ray, machines, running, told)


def _wait(ray: Any, machines: list[Any], running: list[Any], told: list[int]) -> int:
    """Return the highest exit code; once told, or once one has failed, stop all."""
    codes: list[int] = []
    deadline: float | None = None
    while running:
        ended, running = ray.wait(running, timeout=_POLL_S)
        for each in ended:
            try:
                codes.append(ray.get(each))
            except ray.exceptions.RayError as error:  # the machine is gone
                print(f"a machine is lost: {error}", file=sys.stderr)
                codes.append(1)
        if deadline is None and (told or any(codes)):
            deadline = time.monotonic() + _STOP_S
            for machine in machines:
                machine.stop.remote()
        if deadline is not None and time.monotonic() > deadline:
            break
    return 128 + told[0] if told else max([*codes, int(bool(running))])


def _ray() -> Any:
    """Return the package, which this one does not need elsewhere, and a cluster of Ray has."""
    importlib.import_module("ray.util.scheduling_strategies")
    return importlib.import_module("ray")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m syncbn.jobs.engines.ray_nodes")
    for name in ("nodes", "ranks", "cores", "gpus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("command", nargs="+")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
