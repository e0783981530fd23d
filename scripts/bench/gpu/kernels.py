"""Each stage's bytes per second, beside those of a copy of the same tensor in the same run."""

from typing import Any

import torch
from torch import Tensor

from scripts.bench.gpu.cases import LARGE_BYTES, Case, cases
from scripts.bench.gpu.clock import cache_bytes, take_turns
from scripts.bench.gpu.run import Run
from scripts.bench.measure import Rows
from syncbn.kernels.triton import TritonKernels

# Tensors that each stage must read and write.
PASSES = {"copy": 2, "moments": 1, "normalize": 2, "reduce": 2, "input": 3}
STAGES = list(PASSES)[1:]


def bench_kernels(run: Run) -> Rows:
    """Time the stages of the layer by themselves."""
    rows: Rows = []
    for case in run.until_late([c for c in cases(run.tiny) if c.variant != "plain"]):
        taken, how = take_turns(run.device, *_stages(case, run.device))
        copy_s = taken["copy"] / PASSES["copy"]
        row = case.row() | {"MB": case.size_bytes / 1e6, "timed": how}
        row["copy GB/s"] = case.size_bytes / copy_s / 1e9
        passes = PASSES | {"normalize": 3 if "residual" in case.variant else 2}
        row |= {stage: copy_s * passes[stage] / taken[stage] for stage in STAGES}
        rows.append(row)
    return rows


def _stages(case: Case, device: torch.device) -> tuple[dict[str, Any], int]:
    number = case.sets(cache_bytes(device))
    x_of, dy_of = ([case.tensor(device) for _ in range(number)] for _ in range(2))
    c = case.shape[1]
    residual_of: list[Tensor | None] = [None] * number
    if "residual" in case.variant:
        residual_of = [case.tensor(device) for _ in range(number)]
    kernels = TritonKernels()
    weight, bias = torch.ones(c, device=device), torch.zeros(c, device=device)
    moments = kernels.local_moments(x_of[0])
    norm = kernels.normalization(moments, weight, bias, True, 1e-5)
    sums = kernels.backward_reduce(dy_of[0], x_of[0], norm)
    return {
        "copy": lambda i: torch.empty_like(x_of[i % number]).copy_(x_of[i % number]),
        "moments": lambda i: kernels.local_moments(x_of[i % number]),
        "normalize": lambda i: kernels.normalize(x_of[i % number], norm, residual_of[i % number]),
        "reduce": lambda i: kernels.backward_reduce(dy_of[i % number], x_of[i % number], norm),
        "input": lambda i: kernels.backward_input(dy_of[i % number], x_of[i % number], norm, sums),
    }, number


def is_large(row: dict[str, Any]) -> bool:
    """Return whether a row's time is that of its memory."""
    return row["MB"] * 1e6 >= LARGE_BYTES
