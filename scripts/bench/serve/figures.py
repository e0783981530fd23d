"""The measurement of a model: all servers take turns, and the figures that come of it."""

import itertools
import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from scripts.bench.measure import progress
from scripts.bench.serve.in_process import IN_PROCESS, be_model
from scripts.bench.serve.load import Load, Slice, be_load_generator
from scripts.bench.serve.peers import NAMES, OURS, PEERS
from scripts.bench.serve.processes import helper
from scripts.bench.serve.servers import CannotServeError, Server, our_server, peer_server
from scripts.bench.serve.workloads import write_model, write_samples

WARM_UP_S = 0.5
BUSY_S = 0.5
_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        servers: keys of NAMES.
        encodings: of ENCODINGS.
        connections: how many at a time.
        rounds: how often each takes its turn.
        seconds: of a slice.
        environments: where those of the peers are.
    """

    servers: list[str]
    encodings: list[str]
    connections: list[int]
    rounds: int
    seconds: float
    environments: Path

    def asked(self) -> list[tuple[str, int]]:
        """Return what is asked of every server: encodings, and numbers of connections."""
        return list(itertools.product(self.encodings, self.connections))


@dataclass(frozen=True)
class Figures:
    """What was measured of a model.

    Attributes:
        model: of WORKLOADS.
        threads: of torch.
        loads: one a round, by encoding, connections and server.
        rates: images a second without a server, one a round, by what computes.
        failures: why a server is missing, by its key.
        busy: the part of the machine that others used, before each round.
    """

    model: str
    threads: int
    loads: dict[tuple[str, int, str], list[Load]]
    rates: dict[str, list[float]]
    failures: dict[str, str]
    busy: list[float]

    def median(self, asked: tuple[str, int], key: str, value: str) -> float:
        """Return the median of what a server made of it; NaN where it was not measured."""
        loads = self.loads.get((*asked, key), [])
        return statistics.median(getattr(load, value) for load in loads) if loads else math.nan

    def best_peer(self, asked: tuple[str, int]) -> str:
        """Return the key of the fastest of the others."""
        present = [key for key in PEERS if (*asked, key) in self.loads]
        return max(present, key=lambda key: self.median(asked, key, "rate"), default="")

    def ratio(self, asked: tuple[str, int], others: list[float]) -> float:
        """Return the median over the rounds of our rate by another; NaN where one is missing."""
        ours = self.loads.get((*asked, OURS), [])
        ratios = [load.rate / other for load, other in zip(ours, others, strict=False) if other]
        return statistics.median(ratios) if ratios else math.nan

    def over(self, asked: tuple[str, int], key: str) -> float:
        """Return the ratio of our rate to that of another server."""
        return self.ratio(asked, [load.rate for load in self.loads.get((*asked, key), [])])


def measure(model: str, threads: int, plan: Plan) -> Figures:
    """Start all servers, and let them take turns."""
    figures = Figures(model, threads, {}, {name: [] for name in IN_PROCESS}, {}, [])
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory = Path(temporary)
        bundle, samples = write_model(model, directory / "models"), directory / "samples.npz"
        write_samples(bundle, samples)
        generate = stack.enter_context(helper(be_load_generator))
        compute = stack.enter_context(helper(be_model, bundle, samples, threads))

        def load(server: Server, asked: tuple[str, int], seconds: float) -> Load:
            encoding, connections = asked
            wire = server.wires[encoding]
            with server.awake():
                return generate(Slice(server.port, wire, samples, connections, seconds))

        servers: list[Server] = []
        for key in plan.servers:
            there = directory / key
            there.mkdir()
            try:
                server = stack.enter_context(
                    our_server(bundle, threads, there)
                    if key == OURS
                    else peer_server(key, plan.environments, bundle, threads, there)
                )
                for asked in plan.asked():
                    first = load(server, asked, WARM_UP_S)
                    if not first.rate and first.errors:
                        raise CannotServeError(f"does not answer: {first.error}")
                servers.append(server)
            except CannotServeError as error:
                figures.failures[key] = str(error)
                print(f"{NAMES[key]} {error}", file=sys.stderr)
        for turn in range(plan.rounds):
            where = {"model": model, "threads": threads, "turn": turn}
            figures.busy.append(_busy())
            progress({**where, "used by others": f"{figures.busy[-1]:.0%}"})
            for asked in plan.asked():
                for server in _rotated(servers, turn):
                    new = load(server, asked, plan.seconds)
                    figures.loads.setdefault((*asked, server.key), []).append(new)
                    what = dict(zip(("encoding", "connections"), asked, strict=True))
                    progress({**where, **what, "server": server.key, **_rounded(asdict(new))})
            for name in _rotated(list(IN_PROCESS), turn):
                figures.rates[name].append(compute((name, plan.seconds)))
                progress({**where, "how": name, **_rounded({"rate": figures.rates[name][-1]})})
    return figures


def _busy() -> float:
    """Return the part of the machine that is used while all of ours stands still."""

    def ticks() -> tuple[int, int]:
        values = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
        return sum(values), values[3] + values[4]  # idle, and waiting for a disk

    (all_before, idle_before), _, (all_after, idle_after) = ticks(), time.sleep(BUSY_S), ticks()
    return 1 - (idle_after - idle_before) / max(1, all_after - all_before)


def _rotated(items: list[_T], turn: int) -> list[_T]:
    first = turn % max(1, len(items))
    return items[first:] + items[:first]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}
