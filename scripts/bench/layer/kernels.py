"""The kernels of one replica by themselves, beside the speed of a copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.bench.layer.cases import inputs
from scripts.bench.measure import Rows, progress, take_turns
from syncbn.kernels.protocol import Kernels, NativeKernels, ReferenceKernels


def bench_kernels(turns: int) -> Rows:
    """Each kernel alone in one process, as a fraction of the speed of copying such a tensor."""
    rows: Rows = []
    for row, x, dy in inputs():
        rows.append(row | _kernel_fractions(x, dy, turns))
        progress(rows[-1])
    return rows


def _kernel_fractions(x: Tensor, dy: Tensor, turns: int) -> dict[str, float]:
    y, weight, bias = torch.empty_like(x), torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    mean = torch.zeros(x.shape[1], dtype=torch.float64)
    invstd = torch.ones_like(mean)
    # What a kernel must read and write at least, in tensors of x's size.
    tensors = {"moments": 1, "normalize": 2, "reduce": 2, "input": 3}

    def works(name: str, kernels: Kernels) -> dict[str, Callable[[], Any]]:
        return {
            f"{name} moments": lambda: kernels.local_moments(x),
            f"{name} normalize": lambda: kernels.normalize(x, mean, invstd, weight, bias),
            f"{name} reduce": lambda: kernels.backward_reduce(dy, x, mean, invstd),
            f"{name} input": lambda: kernels.backward_input(
                dy, x, mean, invstd, weight, mean, mean
            ),
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
