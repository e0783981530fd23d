"""A training step of one layer, beside torch's unsynchronized one."""

from collections.abc import Callable

from torch import Tensor, nn

import syncbn
from scripts.bench.layer.cases import inputs
from scripts.bench.measure import Rows, progress, take_turns


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return the forward and backward of a layer, which leaves new gradients."""

    def step() -> None:
        x.grad = None
        layer(x).backward(dy)

    return step


def bench_layers(turns: int) -> Rows:
    """Forward and backward of one layer on each rank's own input."""
    rows: Rows = []
    for row, x, dy in inputs():
        x.requires_grad_()
        channels = x.shape[1]
        torch_s, ours_s = take_turns(
            {
                "torch": training_step(nn.BatchNorm2d(channels), x, dy),
                "syncbn": training_step(syncbn.SyncBatchNorm(channels), x, dy),
            },
            turns,
        ).values()
        row |= {"nn.BatchNorm2d µs": torch_s * 1e6, "SyncBatchNorm µs": ours_s * 1e6}
        rows.append(row | {"ratio": ours_s / torch_s})
        progress(rows[-1])
    return rows
