"""Whether the figures of a run keep the bars, in one line each, and the tables that show it."""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from scripts.bench.gpu.kernels import STAGES, is_large
from scripts.bench.measure import Rows, table

Row = dict[str, Any]


def verdicts(figures: dict[str, Any]) -> Rows:
    """Return a row for each bar: what it asks, what was measured, and whether that is enough."""
    kernels = [row for row in figures.get("kernels", []) if is_large(row)]
    layers: Rows = figures.get("layers", [])
    relu = [row["/ chain"] for row in layers if row["variant"] == "relu"]
    large = [row["/ BatchNorm2d"] for row in layers if is_large(row)]
    steps: Rows = figures.get("resnet", [])
    by_chain, by_plain = ([row[key] for row in steps] for key in ("/ chain", "/ BatchNorm2d"))
    ratios = [row["/ chain"] for row in layers]
    mean = statistics.geometric_mean
    rows = [
        _verdict(f"{stage} of large tensors / copy", [row[stage] for row in kernels], min, 0.85, 1)
        for stage in STAGES
    ]
    return [
        *rows,
        _verdict("slowest layer / chain", ratios, max, 1.0),
        _verdict("layers / chain, geometric mean", ratios, mean, 0.8),
        _verdict("layers with ReLU / chain, geometric mean", relu, mean, 0.7),
        _verdict("large layers / nn.BatchNorm2d, slowest", large, max, 1.1),
        _verdict("ResNet-50 step / chain", by_chain, max, 1.0),
        _verdict("ResNet-50 step / nn.BatchNorm2d", by_plain, max, 1.0),
    ]


def _verdict(
    what: str,
    values: list[float],
    summarize: Callable[[list[float]], float],
    bar: float,
    sign: int = -1,
) -> Row:
    """Return a row; sign is 1 if more is better."""
    row: Row = {"bar": f"{what} {'≥' if sign > 0 else '≤'} {bar:.2f}", "cases": len(values)}
    if not values:
        return row | {"measured": "", "verdict": "not measured"}
    measured = summarize(values)
    kept = sign * (measured - bar) >= 0
    return row | {"measured": f"{measured:.3f}", "verdict": "kept" if kept else "MISSED"}


def report(name: str, rows: Rows) -> str:
    """Return a section's tables: the cases themselves if they are few, else by kind."""
    if name == "kernels":
        return table(_by_kind(rows, STAGES, "least", min))
    if name == "layers":
        return table(_by_kind(rows, ["/ chain", "/ BatchNorm2d"], "most", max))
    return table(rows)


def _by_kind(
    rows: Rows, columns: list[str], worst: str, of: Callable[[list[float]], float]
) -> Rows:
    """Return a row for each dtype, layout and variant, large tensors apart from small ones."""

    def kind(row: Row) -> tuple[str, ...]:
        size = "large" if is_large(row) else "small"
        return row["dtype"], row["layout"], row["variant"], size

    result: Rows = []
    for key, group in itertools.groupby(sorted(rows, key=kind), kind):
        found = list(group)
        row: Row = dict(zip(("dtype", "layout", "variant", "tensors"), key, strict=True))
        row["cases"] = len(found)
        for column in columns:
            values = [each[column] for each in found]
            row[column] = statistics.geometric_mean(values)
            row[f"{worst} {column}"] = of(values)
        result.append(row)
    return result
