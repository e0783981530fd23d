"""torch's SyncBatchNorm as of several ranks, whose exchange gives back what it is given.

One GPU has no second rank for torch's layer to meet, and alone it takes another way. So these are
the operations of its forward and backward pass, in their order; its masks of empty ranks, for which
the host waits, are left out, as torch itself does while a CUDA graph is captured. Ours has the same
exchange by `exchanging_with_itself`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from syncbn.comm import exchange
from syncbn.layers import base


class PlainOperations:
    """In place of torch's operations, which it has for CUDA alone: enough to try a script out."""

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return means and 1/√(σ² + eps)."""
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x: Tensor, mean: Tensor, invstd: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the only rank's means and 1/√(σ² + eps)."""
        return mean[0], invstd[0]

    @staticmethod
    def batch_norm_elemt(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        """Return y."""
        scale = (invstd * weight).view(-1, 1, 1)
        return ((x - mean.view(-1, 1, 1)) * scale + bias.view(-1, 1, 1)).to(x.dtype)

    @staticmethod
    def batch_norm_backward_reduce(
        dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, *_: Any
    ) -> tuple[Tensor, ...]:
        """Return Σdy, Σdy·(x − mean), and the gradients of weight and bias."""
        sum_dy = dy.float().sum((0, 2, 3))
        sum_dy_xmu = (dy * (x - mean.view(-1, 1, 1))).sum((0, 2, 3))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy

    @staticmethod
    def batch_norm_backward_elemt(
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
        count: Tensor,
    ) -> Tensor:
        """Return dx."""
        slope = (invstd.square() * sum_dy_xmu / count).view(-1, 1, 1)
        centered = dy - (sum_dy / count).view(-1, 1, 1)
        scale = (invstd * weight).view(-1, 1, 1)
        return ((centered - (x - mean.view(-1, 1, 1)) * slope) * scale).to(x.dtype)


class _Chain(torch.autograd.Function):
    """The same calls as in `torch.nn.modules._functions.SyncBatchNorm`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *args: Any)
        x, weight, bias, running_mean, running_var, eps, momentum = inputs
        operations: Any = torch if x.is_cuda else PlainOperations
        c = x.shape[1]
        mean, invstd = operations.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // c, dtype=mean.dtype, device=mean.device)
        combined = torch.cat([mean, invstd, count]).view(1, -1)
        mean_all, invstd_all, count_all = torch.split(combined, c, dim=1)
        counts = count_all.view(-1)
        mean, invstd = operations.batch_norm_gather_stats_with_counts(
            x, mean_all, invstd_all, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, count_all.to(torch.int32))
        return operations.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x, weight, mean, invstd, count = ctx.saved_tensors
        operations: Any = torch if x.is_cuda else PlainOperations
        dy = grads[0]
        if not dy.is_contiguous(memory_format=torch.channels_last):
            dy = dy.contiguous()
        sum_dy, sum_dy_xmu, dweight, dbias = operations.batch_norm_backward_reduce(
            dy, x, mean, invstd, weight, True, True, True
        )
        combined = torch.cat([sum_dy, sum_dy_xmu])
        sum_dy, sum_dy_xmu = torch.split(combined, x.shape[1])
        dx = operations.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count
        )
        return dx, dweight, dbias, None, None, None, None


class Chain(nn.BatchNorm2d):
    """torch's SyncBatchNorm in training, on one GPU; see the module."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""
        running_mean, running_var = self.running_mean, self.running_var
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        parameters = self.weight, self.bias, running_mean, running_var
        y: Any = _Chain.apply(input, *parameters, self.eps, self.momentum)
        return y


class _Itself:
    """A reducer of two replicas, of which the other one is not there."""

    group = None
    world_size = 2
    rank = 0

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        return vector

    def gather(self, vector: Tensor) -> Tensor:
        return vector.unsqueeze(0)


@contextmanager
def exchanging_with_itself() -> Generator[None]:
    """Have our layers do within what they do in a world of several ranks, but send nothing."""
    itself = _Itself()
    with (
        mock.patch.object(base, "select_reducer", return_value=itself),
        mock.patch.object(exchange, "record_of", return_value=None),
    ):
        yield
