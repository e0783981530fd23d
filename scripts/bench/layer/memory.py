"""The bytes that a forward keeps for backward; counted, not timed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import syncbn
from scripts.bench.layer.cases import inputs
from scripts.bench.measure import Rows, progress


def count_memory(_turns: int) -> Rows:
    """KiB that a forward keeps for backward, of one replica, beside those of its input."""
    rows: Rows = []
    for row, x, _ in inputs():
        if row.pop("layout") != "contiguous":
            continue  # the same tensors in another order
        x.requires_grad_()
        residual, channels = torch.randn_like(x).requires_grad_(), x.shape[1]
        plain, ours = nn.BatchNorm2d(channels), syncbn.SyncBatchNorm(channels)
        fused = syncbn.SyncBatchNorm(channels, relu=True)
        row |= {
            "x": x.nbytes / 1024,
            "nn.BatchNorm2d": _kept_kib(plain, x),
            "SyncBatchNorm": _kept_kib(ours, x),
            "nn.BatchNorm2d, ReLU": _kept_kib(lambda x, f=plain: f(x).relu(), x),
            "SyncBatchNorm with ReLU": _kept_kib(fused, x),
            "nn.BatchNorm2d, + residual, ReLU": _kept_kib(
                lambda x, r, f=plain: (f(x) + r).relu(), x, residual
            ),
            "SyncBatchNorm with both": _kept_kib(fused, x, residual),
        }
        rows.append(row)
        progress(row)
    return rows


def _kept_kib(forward: Callable[..., Tensor], *arguments: Tensor) -> float:
    kept: set[tuple[int, int]] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add((tensor.data_ptr(), tensor.nbytes))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(*arguments)
    assert y.grad_fn is not None  # holds what was kept, so that no address came up twice
    return sum(size for _, size in kept) / 1024
