"""The tables of a model, the bars that it is held to, and what went wrong."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scripts.bench.measure import Rows, table
from scripts.bench.serve.figures import Figures, Plan
from scripts.bench.serve.peers import NAMES, OURS


@dataclass(frozen=True)
class Bar:
    """What is required of us.

    Attributes:
        words: what.
        connections: at how many.
        value: what is seen of an encoding and number of connections.
        least: what it must reach; None where `below` is the bar.
        below: what it must stay under.
    """

    words: str
    connections: int
    value: Callable[[Figures, tuple[str, int]], float]
    least: float | None = None
    below: float = math.inf

    def line(self, measured: list[Figures], encodings: list[str]) -> str:
        """Return what was seen of it, and whether it is met."""
        seen: dict[str, float] = {}
        for figures, encoding in itertools.product(measured, encodings):
            threads = "1 thread" if figures.threads == 1 else f"{figures.threads} threads"
            seen[f"{encoding}, {threads}"] = self.value(figures, (encoding, self.connections))
        seen = {name: value for name, value in seen.items() if not math.isnan(value)}
        if not seen:
            return f"- {self.words}: not measured."
        met = all((self.least or 0) <= value < self.below for value in seen.values())
        each = "; ".join(f"{name}: {value:.2f}" for name, value in seen.items())
        return f"- {self.words}: {'met' if met else 'missed'} ({each})."


def _over_best(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, figures.best_peer(asked))


def _over_fastapi(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, "fastapi")


def _over_inline(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.over(asked, "fastapi-inline")


def _over_in_process(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.ratio(asked, figures.rates["as served"])


def _p99(figures: Figures, asked: tuple[str, int]) -> float:
    return figures.median(asked, OURS, "p99_ms")


BARS = {
    "tiny": [
        Bar("32 connections, 3 times the best of the others", 32, _over_best, 3),
        Bar("32 connections, 99 % answered in under 20 ms", 32, _p99, below=20),
        Bar("1 connection, 0.9 times FastAPI", 1, _over_fastapi, 0.9),
        Bar("1 connection, 0.9 times FastAPI inline", 1, _over_inline, 0.9),
    ],
    "resnet18": [
        Bar("32 connections, 1.2 times the best of the others", 32, _over_best, 1.2),
        Bar("32 connections, 0.9 times a batch of 16 without server", 32, _over_in_process, 0.9),
        Bar("8 connections, 1.4 times the best of the others", 8, _over_best, 1.4),
    ],
}


def report(measured: list[Figures], plan: Plan) -> str:
    """Return the tables of a model, its bars, and what went wrong."""
    rates: Rows = []
    times: Rows = []
    for figures, asked in itertools.product(measured, plan.asked()):
        row = {"threads": figures.threads, "encoding": asked[0], "connections": asked[1]}
        rate = {NAMES[key]: figures.median(asked, key, "rate") for key in plan.servers}
        rates.append({**row, **_marked(rate), **_marked({"ratio": _over_best(figures, asked)})})
        took = {
            NAMES[key]: " / ".join(
                f"{figures.median(asked, key, value):.1f}" for value in ("p50_ms", "p99_ms")
            )
            for key in plan.servers
        }
        times.append({**row, **took})
    alone: Rows = [
        {"threads": figures.threads}
        | {name: statistics.median(each) for name, each in figures.rates.items()}
        for figures in measured
    ]
    bars = [bar.line(measured, plan.encodings) for bar in BARS[measured[0].model]]
    return "\n\n".join(
        [
            "Requests a second; the ratio is of ours to the best of the others:",
            table(rates),
            "Milliseconds to an answer, median / 99th percentile:",
            table(times),
            "Images a second without a server, in batches of 16:",
            table(alone),
            "\n".join([*bars, f"- No errors: {_errors(measured)}"]),
        ]
    )


def _marked(values: dict[str, float]) -> dict[str, Any]:
    return {name: "–" if math.isnan(value) else value for name, value in values.items()}


def _errors(measured: list[Figures]) -> str:
    """Return what went wrong at whom."""
    lines: list[str] = []
    for figures in measured:
        for key, why in figures.failures.items():
            lines.append(f"{NAMES[key]} on {figures.threads} threads {' '.join(why.split())}")
        for (encoding, connections, key), loads in figures.loads.items():
            for load in loads:
                if load.errors:
                    asked = f"{encoding}, {connections} connections, {figures.threads} threads"
                    lines.append(f"{NAMES[key]} ({asked}): {load.errors}, first {load.error}")
    ours = [line for line in lines if line.startswith(NAMES[OURS])]
    return "; ".join([f"{'missed' if ours else 'met'}", *lines]) + "."


def as_json(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON has them."""
    loads = [
        {"encoding": encoding, "connections": connections, "server": key, **asdict(load)}
        for (encoding, connections, key), each in figures.loads.items()
        for load in each
    ]
    return {
        "threads": figures.threads,
        "loads": loads,
        "rates": figures.rates,
        "failures": figures.failures,
        "busy": figures.busy,
    }
