"""The layer of another checkout beside this one's and torch's, such as before a change and after.

The ranks of both checkouts live at the same time and take turns, so that what else the machine does
meets both. They are started several times, because where a process happens to have its memory makes
it faster or slower for all of its life.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts import REPOSITORY
from scripts.bench.layer.cases import DTYPES, LAYOUTS, SHAPES
from scripts.bench.measure import KEEP_MEMORY, Rows, progress, table

SMALLEST = (2, 64, 2, 2)  # the time of a step is Python's alone
CASES: list[dict[str, Any]] = [
    {"dtype": str(dtype)[6:], "shape": shape, "layout": layout}
    for dtype, shape, layout in itertools.product(DTYPES, [*SHAPES, SMALLEST], LAYOUTS)
]
WORLD_SIZES = (1, 2)
STARTS = 3
TURNS = 9  # of each start
# Short beside the time that the system gives a process that has waited: most turns of a busy
# machine are then undisturbed, and the median is one of those.
TURN_S = 4e-3
RANK = Path(__file__).with_name("rank.py")
# In this order, and backward every other turn. Each layer of ours is next to torch's of the same
# processes, and the two of ours are next to each other.
COMPETITORS = [("before", "torch"), ("before", "syncbn"), ("after", "syncbn"), ("after", "torch")]

Ask = Callable[[dict[str, Any]], float]
Times = dict[tuple[str, str], list[float]]


def compare(
    checkout: Path,
    turns: int = TURNS,
    starts: int = STARTS,
    world_sizes: Sequence[int] = WORLD_SIZES,
    cases: Sequence[dict[str, Any]] = CASES,
) -> Rows:
    """Return a row for each case and world size.

    Args:
        checkout: of this project, of another version: what is called "before".
        turns: of each start.
        starts: how often the ranks are started anew.
        world_sizes: numbers of ranks.
        cases: dtypes, shapes and layouts of the input.
    """
    rows: Rows = []
    for world_size in world_sizes:
        times = [Times() for _ in cases]
        for start in range(starts):
            progress({"W": world_size, "start": start})
            with (
                _ranks(checkout, world_size) as before,
                _ranks(REPOSITORY, world_size) as after,
            ):
                asks = {"before": before, "after": after}
                for case, of_case in zip(cases, times, strict=True):
                    for key, new in _take_turns(asks, case, turns).items():
                        of_case.setdefault(key, []).extend(new)
        for case, of_case in zip(cases, times, strict=True):
            rows.append({"W": world_size, **case} | _row(of_case))
            progress(rows[-1])
    return rows


def _take_turns(asks: dict[str, Ask], case: dict[str, Any], turns: int) -> Times:
    """Return how long a step took in each turn, of each checkout and layer, in seconds."""
    for ask in asks.values():
        ask(case)
    steps: dict[tuple[str, str], int] = {}
    for which, layer in COMPETITORS:
        step_s = min(asks[which]({"layer": layer, "steps": 1}) for _ in range(5))
        steps[which, layer] = max(1, round(TURN_S / step_s))
    times: Times = defaultdict(list)
    for turn in range(turns):
        for which, layer in COMPETITORS if turn % 2 == 0 else COMPETITORS[::-1]:
            question = {"layer": layer, "steps": steps[which, layer]}
            times[which, layer].append(asks[which](question))
    return times


def _row(times: Times) -> dict[str, float]:
    torch_s = [s for (_, layer), of_turns in times.items() if layer == "torch" for s in of_turns]
    columns = {
        "nn.BatchNorm2d µs": statistics.median(torch_s) * 1e6,
        "before µs": statistics.median(times["before", "syncbn"]) * 1e6,
        "after µs": statistics.median(times["after", "syncbn"]) * 1e6,
    }
    for name, (over, under) in RATIOS.items():
        pairs = zip(times[over], times[under], strict=True)
        columns[name] = statistics.median(a / b for a, b in pairs)
    return columns


# Each the median over the turns. The last is 1 but for what the machine does besides.
RATIOS = {
    "before / torch": (("before", "syncbn"), ("before", "torch")),
    "after / torch": (("after", "syncbn"), ("after", "torch")),
    "after / before": (("after", "syncbn"), ("before", "syncbn")),
    "torch / torch": (("after", "torch"), ("before", "torch")),
}


@contextmanager
def _ranks(checkout: Path, world_size: int) -> Generator[Ask]:
    """Start the ranks of a checkout; yield what asks all of them, and returns the slowest's answer.

    Meanwhile they wait for a question without using the processor.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        for rank in range(world_size):
            # -P: modules beside rank.py are not to be found by it.
            command = [sys.executable, "-P", str(RANK), str(checkout), f"{directory}/store"]
            process = subprocess.Popen(
                [*command, str(rank), str(world_size)],
                bufsize=0,
                env={**os.environ, **KEEP_MEMORY, "PYTHONPATH": str(checkout)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)

        def ask(question: dict[str, Any]) -> float:
            for process in ranks:
                assert process.stdin
                with suppress(BrokenPipeError):  # it ended, as reading will tell
                    process.stdin.write(json.dumps(question).encode() + b"\n")
            return max(map(answer, ranks))

        def answer(process: subprocess.Popen[bytes]) -> float:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                sys.exit(f"a rank of {checkout} ended with {process.wait()}")
            return float(line)

        yield ask


def report(rows: Rows) -> str:
    """Return all rows, their geometric means and worst, and the time of the smallest input."""
    summaries: Rows = []
    for world_size, dtype in dict.fromkeys((row["W"], row["dtype"]) for row in rows):
        found = [row for row in rows if (row["W"], row["dtype"]) == (world_size, dtype)]
        summary: dict[str, Any] = {"W": world_size, "dtype": dtype}
        for name in RATIOS:
            ratios = [row[name] for row in found]
            mean, worst = statistics.geometric_mean(ratios), max(ratios)
            summary[f"{name}: mean, worst"] = f"{mean:.2f}, {worst:.2f}"
        summaries.append(summary)
    smallest = [
        f"- W = {row['W']}, {row['dtype']}, {row['layout']}: nn.BatchNorm2d "
        f"{row['nn.BatchNorm2d µs']:.1f} µs, before {row['before µs']:.1f} µs, "
        f"after {row['after µs']:.1f} µs"
        for row in rows
        if row["shape"] == SMALLEST
    ]
    return "\n\n".join(
        [
            table(rows),
            "Geometric mean over the inputs, and the worst of them:",
            table(summaries),
            f"A step with the smallest input, {SMALLEST}:",
            "\n".join(smallest),
        ]
    )
