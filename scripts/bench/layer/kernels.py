"""The kernels of one replica by themselves, beside the speed of a copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.bench.layer.cases import inputs
from scripts.bench.measure import Rows, progress, take_turns
from syncbn.kernels.native import NativeKernels
from syncbn.kernels.protocol import Kernels, Normalization
from syncbn.kernels.reference import ReferenceKernels


def bench_kernels(turns: int) -> Rows:
    """Each kernel alone in one process, as a fraction of the speed of copying such a tensor."""
    rows: Rows = []
    for row, x, dy in inputs():
        rows.append(row | _kernel_fractions(x, dy, turns))
        progress(rows[-1])
    return rows


def _kernel_fractions(x: Tensor, dy: Tensor, turns: int) -> dict[str, float]:
    y, weight, bias = torch.empty_like(x), torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    statistics = torch.ones(2 * x.shape[1] + 1, dtype=torch.float64)
    norm, sums = Normalization(statistics, weight, bias), torch.zeros_like(statistics[1:])
    # What a kernel must read and write at least, in tensors of x's size.
    tensors = {"moments": 1, "normalize": 2, "reduce": 2, "input": 3}

    def works(name: str, kernels: Kernels) -> dict[str, Callable[[], Any]]:
        return {
            f"{name} moments": lambda: kernels.local_moments(x),
            f"{name} normalize": lambda: kernels.normalize(x, norm),
            f"{name} reduce": lambda: kernels.backward_reduce(dy, x, norm),
            f"{name} input": lambda: kernels.backward_input(dy, x, norm, sums),
        }

    taken = take_turns(
        {
            "copy": lambda: y.copy_(x),
            **works("native", NativeKernels()),
            **works("reference", ReferenceKernels()),
        },
        turns,
    )
    tensor_s = taken.pop("copy") / 2
    return {name: tensors[name.split()[1]] * tensor_s / time_s for name, time_s in taken.items()}
