"""A training step of one layer beside torch's chain of operations, and beside nn.BatchNorm2d."""

from scripts.bench.gpu.cases import cases, steps
from scripts.bench.gpu.clock import cache_bytes, take_turns
from scripts.bench.gpu.run import Run
from scripts.bench.measure import Rows


def bench_layers(run: Run) -> Rows:
    """Time forward and backward; a ReLU or a residual is a separate operation except in ours."""
    rows: Rows = []
    cached = cache_bytes(run.device)
    for case in run.until_late(cases(run.tiny)):
        competitors = steps(case, run.device, cached)
        taken, how = take_turns(run.device, competitors, case.sets(cached))
        row = case.row() | {"MB": case.size_bytes / 1e6, "timed": how}
        row |= {f"{name} µs": time_s * 1e6 for name, time_s in taken.items()}
        row["/ chain"] = taken["ours, exchanged"] / taken["chain"]
        row["/ BatchNorm2d"] = taken["ours"] / taken["nn.BatchNorm2d"]
        rows.append(row)
    return rows
