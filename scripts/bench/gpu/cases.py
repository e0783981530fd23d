"""What is measured: the inputs of ResNet-50's layers, and the layers that are compared."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import syncbn
from scripts.bench.gpu.chain import Chain, exchanging_with_itself

# Channels and height of the inputs of ResNet-50's layers, for images of 224×224 pixels.
IMAGES = [
    *[(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28)],
    *[(256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)],
]
TINY_IMAGES = [(6, 5), (16, 4)]
# Each in the order of what matters most.
BATCHES = [256, 32, 128, 64]
KINDS = [
    *[("bfloat16", "channels_last"), ("float32", "contiguous"), ("float16", "channels_last")],
    *[("bfloat16", "contiguous"), ("float32", "channels_last"), ("float16", "contiguous")],
]
VARIANTS = ["relu", "plain", "residual + relu"]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A tensor of so many bytes is large: its time is that of its memory.
LARGE_BYTES = 64e6
_MOST_SETS = 32
Step = Callable[[int], Any]


class Case(NamedTuple):
    """A kind of input, and what follows the normalization."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    variant: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the input."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def row(self) -> dict[str, Any]:
        """Return the columns of a table that identify the case."""
        shape = "×".join(map(str, self.shape))
        return {"shape": shape, **dict(zip(self._fields[1:], self[1:], strict=True))}

    def tensor(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new tensor like the input, of normal values."""
        x = torch.empty(self.shape, dtype=dtype or getattr(torch, self.dtype), device=device)
        return x.contiguous(memory_format=MEMORY_FORMATS[self.layout]).normal_()

    def sets(self, cache_bytes: int) -> int:
        """Return how many inputs and gradients, in turns, do not fit into a cache."""
        return min(max(1, math.ceil(cache_bytes / (2 * self.size_bytes))), _MOST_SETS)


def cases(tiny: bool) -> list[Case]:
    """Return what to measure, of each kind something first."""
    images, batches = (TINY_IMAGES, [2]) if tiny else (IMAGES, BATCHES)
    ranks = list(
        itertools.product(range(len(batches)), range(len(KINDS)), range(len(VARIANTS)), images)
    )
    ranks.sort(key=lambda rank: sum(rank[:3]))
    if tiny:
        ranks = ranks[:6]
    return [
        Case((batches[batch], c, side, side), *KINDS[kind], VARIANTS[variant])
        for batch, kind, variant, (c, side) in ranks
    ]


def steps(case: Case, device: torch.device, cache_bytes: int) -> dict[str, Step]:
    """Return the forward and backward pass by each layer, on the i-th of several inputs.

    Ours is there twice: alone, and with the exchange that torch's chain has.
    """
    sets = [
        [case.tensor(device).requires_grad_(), case.tensor(device)]
        for _ in range(case.sets(cache_bytes))
    ]
    residuals = None
    if "residual" in case.variant:
        residuals = [case.tensor(device).requires_grad_() for _ in sets]
    relu, c = "relu" in case.variant, case.shape[1]
    ours = syncbn.SyncBatchNorm(c, relu=relu, device=device)
    chain, plain = Chain(c, device=device), nn.BatchNorm2d(c, device=device)

    def differentiated(layer: nn.Module, forward: Callable[..., Tensor]) -> Step:
        def step(i: int) -> Any:
            x, dy = sets[i % len(sets)]
            residual = None if residuals is None else residuals[i % len(sets)]
            inputs = [x, *layer.parameters(), *([] if residual is None else [residual])]
            return torch.autograd.grad(forward(x, residual), inputs, dy)

        return step

    def separate(layer: nn.Module) -> Step:
        def forward(x: Tensor, residual: Tensor | None) -> Tensor:
            y = layer(x)
            if residual is not None:
                y = y.add_(residual)
            return functional.relu(y, inplace=True) if relu else y

        return differentiated(layer, forward)

    alone = differentiated(ours, ours)

    def exchanged(i: int) -> Any:
        with exchanging_with_itself():
            return alone(i)

    return {
        "ours": alone,
        "ours, exchanged": exchanged,
        "chain": separate(chain),
        "nn.BatchNorm2d": separate(plain),
    }
