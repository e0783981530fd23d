"""The inputs that the layer and its kernels are measured on."""

import itertools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

SHAPES = [(16, 64, 56, 56), (8, 256, 14, 14), (32, 128, 16, 16), (8, 512, 4, 4), (2, 64, 28, 28)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16]


def inputs() -> Generator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield inputs and upstream gradients, with the columns of a table that say which they are."""
    for dtype, shape, layout in itertools.product(DTYPES, SHAPES, LAYOUTS):
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        x, dy = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (x, dy))
        yield {"dtype": str(dtype)[6:], "shape": str(shape), "layout": layout}, x, dy
