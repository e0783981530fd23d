"""`sync_batch_norm`: batch normalization over all replicas, with its true gradient."""

import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives import Reducer, select_reducer
from syncbn.errors import InputError
from syncbn.kernels import Kernels, ReferenceKernels, select_kernels
from syncbn.moments import Moments
from syncbn.reduction import Call, Memory, global_moments, global_sum, require_two_values


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
    DistributedDataParallel averages parameters' gradients afterwards. All of them can be
    differentiated again, any number of times.

    Communicates: one all-reduce of 2C + 1 float64 forward and, when x needs a gradient, one of 2C
    backward; none in a world of one. Every replica must call it, in the same order. Differentiating
    the gradient sends two more of 2C.

    Error: y within a few roundings of its compute dtype (float32 for half precision); σ² is summed
    in float64 about zero, so its relative error is about 2⁻⁵²·(1 + μ²/σ²) beyond the input's own
    rounding. `SyncBatchNorm` remembers a better centre; see docs/numerics.md.

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
            variance is undefined (on every replica, after the reduction).
        ReplicaError: the all-reduce failed, or what the replicas sent does not belong together.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the gradient of
    section 3.
    """
    if reason := reason_to_refuse(x):
        raise InputError(reason)
    reducer = select_reducer(process_group, x.device)
    y, moments, _ = normalize_with_memory(x, weight, bias, eps, reducer, None)
    return y, moments


def reason_to_refuse(x: Tensor) -> str:
    """Return what is wrong with an input of any number of channels; '' for nothing."""
    if x.dim() < 2:
        return f"expected an input of shape (N, C, *), got {tuple(x.shape)}; add a batch dimension"
    if not x.is_floating_point():
        return f"expected a floating-point input, got {x.dtype}; convert it first"
    return ""


def normalize_with_memory(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reducer: Reducer,
    memory: Memory | None,
) -> tuple[Tensor, Moments, bool]:
    """Do what `sync_batch_norm` does for a layer, whose memory betters and spares reductions.

    Returns:
        y; the moments of the whole batch; and whether this call repeats an earlier one for
        activation checkpointing, whose moments it then returns without having communicated.
    """
    call = Call(reducer, memory, x.shape[1], x.dtype)
    outputs: tuple[Tensor, ...] = _SyncBatchNorm.apply(x, weight, bias, eps, select_kernels(), call)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    y, count, mean, m2, _ = outputs
    replayed = call.reduction is not None and call.reduction.replayed
    return y, Moments(count, mean, m2), replayed


class _SyncBatchNorm(torch.autograd.Function):
    """(x, weight, bias) to (y, count, mean, m2, invstd); only y has a gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kernels: Kernels,
        call: Call,
    ) -> tuple[Tensor, ...]:
        moments = global_moments(kernels.local_moments(x), call)
        require_two_values(moments.count, x[:, 0].numel(), call)
        invstd = torch.rsqrt(moments.variance() + eps)
        y = kernels.normalize(x, moments.mean, invstd, weight, bias)
        if torch.compiler.is_compiling():
            # torch 2.11 compiles a gradient of 0 for an output of in-place operations or of a cast
            # to the dtype that it has; the compiler fuses the copy away.
            y = y.clone(memory_format=torch.preserve_format)
        return y, moments.count, moments.mean, moments.m2, invstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.kernels, ctx.call = inputs
        _, count, mean, m2, invstd = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(count, mean, m2, invstd)
        ctx.save_for_backward(x, weight, count, mean, invstd)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        dy = grads[0]
        x, weight, count, mean, invstd = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        call: Call = ctx.call
        add_up = global_sum
        # Grad mode is on here when the gradient is to be differentiated in turn.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kernels, add_up = ReferenceKernels(), _differentiable_sum
            mean, invstd = _as_function_of_x(x, count, mean, invstd, call)
        sum_dy, sum_dy_xhat = kernels.backward_reduce(dy, x, mean, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = add_up(torch.cat([sum_dy, sum_dy_xhat]), call) / count.clamp(min=1)
            mean_dy, mean_dy_xhat = sums.chunk(2)
            dx = kernels.backward_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat)
        dweight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sum_dy.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kernels: Kernels,
        call: Call,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Normalise an ensemble: its members stand beside each other as further channels."""
        members, channels = info.batch_size, call.channels

        def beside(tensor: Tensor | None, member_axis: int | None, at: int) -> Tensor | None:
            if tensor is None:
                return None
            if member_axis is None:
                tensor = tensor.unsqueeze(at)
                shape = [members if axis == at else -1 for axis in range(tensor.dim())]
                tensor = tensor.expand(shape)
            else:
                tensor = tensor.movedim(member_axis, at)
            return tensor.flatten(at, at + 1)

        together = replace(call, memory=None, channels=members * channels)
        x_together = beside(x, in_dims[0], 1)
        parameters = beside(weight, in_dims[1], 0), beside(bias, in_dims[2], 0)
        outputs: tuple[Tensor, ...] = _SyncBatchNorm.apply(
            x_together, *parameters, eps, kernels, together
        )  # pyright: ignore[reportAssignmentType] -- as above
        y, count, *vectors = outputs
        vectors = [vector.unflatten(0, (members, channels)) for vector in vectors]
        return (y.unflatten(1, (members, channels)), count, *vectors), (1, None, 0, 0, 0)


# torch binds the arguments of every call to the signature; found here, it need not be made anew.
_SyncBatchNorm.forward.__signature__ = inspect.signature(_SyncBatchNorm.forward)  # pyright: ignore[reportFunctionMemberAccess] -- what inspect documents for it


def _as_function_of_x(
    x: Tensor, count: Tensor, mean: Tensor, invstd: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Return mean and invstd, of values known already, as what they are: functions of x."""
    outputs: tuple[Tensor, Tensor] = _Statistics.apply(x, count, mean, invstd, call)  # pyright: ignore[reportAssignmentType] -- as above
    return outputs


class _Statistics(torch.autograd.Function):
    """x to mean and invstd: ∂mean/∂x = 1/n and ∂invstd/∂x = −invstd³·(x − mean)/n, n = count."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x: Tensor, count: Tensor, mean: Tensor, invstd: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        return mean.clone(), invstd.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, count, _, _, ctx.call = inputs
        ctx.save_for_backward(x, count, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x, count, mean, invstd = ctx.saved_tensors
        sums = _differentiable_sum(torch.cat(grads), ctx.call) / count.clamp(min=1)
        dmean, dinvstd = sums.chunk(2)
        # The kernel's formula with dy = 0 and a weight of 1.
        dx = ReferenceKernels().backward_input(
            torch.zeros_like(x), x, mean, invstd, None, -dmean / invstd, dinvstd * invstd
        )
        return dx, None, None, None, None


def _differentiable_sum(vector: Tensor, call: Call) -> Tensor:
    if call.reducer.world_size == 1:
        return vector
    total: Tensor = _GlobalSum.apply(vector, call)  # pyright: ignore[reportAssignmentType] -- as above
    return total


class _GlobalSum(torch.autograd.Function):
    """The sum over replicas; what depends on it anywhere depends on every replica's share."""

    @staticmethod
    def forward(vector: Tensor, call: Call) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return global_sum(vector, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return _differentiable_sum(grads[0], ctx.call), None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any, in_dims: tuple[int | None, ...], vector: Tensor, call: Call
    ) -> tuple[Tensor, int | None]:
        return _differentiable_sum(vector, call), in_dims[0]
