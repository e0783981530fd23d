"""`sync_batch_norm`: batch normalization over all replicas, with its true gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn.collectives import Reducer, select_reducer
from syncbn.errors import InputError
from syncbn.kernels import Kernels, select_kernels
from syncbn.moments import Moments, from_summable, to_summable


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise x by the mean and variance of the batch that all replicas hold together.

    y = (x − μ)/√(σ² + eps)·weight + bias, with μ and the biased σ² of each channel over the
    concatenation of every replica's x along N. Replicas may hold different N and spatial sizes,
    or nothing.

    The gradient flows through μ and σ over all replicas: dx = weight/σ·(dy − mean(dy) −
    x̂·mean(dy·x̂)). The gradients of weight and bias are this replica's share alone, because
    DistributedDataParallel averages parameters' gradients afterwards.

    Communicates: one all-reduce of 2C + 1 float64 forward and, when x needs a gradient, one of 2C
    backward; none in a world of one. Every replica must call it, in the same order.

    Error: y within a few roundings of its compute dtype (float32 for half precision); σ² is summed
    in float64 about zero, so its relative error is about 2⁻⁵²·(1 + μ²/σ²) beyond the input's own
    rounding.

    Args:
        x: shape (N, C, *), floating point, any memory format; y keeps dtype and format.
        weight: γ, shape (C,), any floating dtype; None means 1.
        bias: β, shape (C,), any floating dtype; None means 0.
        eps: added to σ² inside the square root; dimension of x².
        process_group: the replicas; None means the default group, or this process alone where
            `torch.distributed` is not initialised.

    Returns:
        y, and the moments of the whole batch, which carry no gradient.

    Raises:
        InputError: x is not floating point or has fewer than two dimensions (on this replica,
            before anything is sent); or all replicas together hold one value per channel, whose
            variance is undefined (on every CPU replica, after the reduction).

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the gradient of
    section 3.
    """
    if x.dim() < 2:
        raise InputError(
            f"expected an input of shape (N, C, *), got {tuple(x.shape)}; add a batch dimension"
        )
    if not x.is_floating_point():
        raise InputError(f"expected a floating-point input, got {x.dtype}; convert it first")
    outputs: tuple[Tensor, ...] = _SyncBatchNorm.apply(
        x, weight, bias, eps, select_kernels(), select_reducer(process_group)
    )  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    y, count, mean, m2 = outputs
    return y, Moments(count, mean, m2)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kernels: Kernels,
        reducer: Reducer,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = kernels.local_moments(x)
        moments = local
        if reducer.world_size > 1:
            moments = from_summable(reducer.sum(to_summable(local)))
        # Only now do all replicas know the total, so that all of them raise together. Off the CPU
        # the comparison would make the host wait for the device.
        if moments.count.device.type == "cpu" and moments.count == 1:
            raise InputError(
                "expected more than 1 value per channel over all replicas when training, got 1 "
                f"(this replica's input: {tuple(x.shape)}); use a larger batch, or eval mode"
            )
        invstd = torch.rsqrt(moments.variance() + eps)
        y = kernels.normalize(x, moments.mean, invstd, weight, bias)

        ctx.save_for_backward(x, weight, bias, moments.count, moments.mean, invstd)
        ctx.kernels, ctx.reducer = kernels, reducer
        outputs = (moments.count, moments.mean, moments.m2)
        ctx.mark_non_differentiable(*outputs)
        return y, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any) and is decorated here
        dy = grads[0]
        x, weight, bias, count, mean, invstd = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        reducer: Reducer = ctx.reducer
        sum_dy, sum_dy_xhat = kernels.backward_reduce(dy, x, mean, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = reducer.sum(torch.cat([sum_dy, sum_dy_xhat])) / count.clamp(min=1)
            mean_dy, mean_dy_xhat = sums.chunk(2)
            dx = kernels.backward_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat)
        dweight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sum_dy.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None
