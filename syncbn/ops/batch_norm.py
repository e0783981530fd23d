"""`sync_batch_norm`: batch normalization over all replicas, with its true gradient."""

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.exchange import Call, global_moments, require_two_values
from syncbn.comm.reducer import select_reducer
from syncbn.errors import InputError
from syncbn.kernels.native import is_plain
from syncbn.kernels.protocol import Kernels, NativeKernels, select_kernels
from syncbn.moments import Moments
from syncbn.ops.generic import Saved, gradients, masks
from syncbn.ops.native import NativeSyncBatchNorm


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    reducer: str | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise x by the mean and variance of the batch that all replicas hold together.

    y = (x − μ)/√(σ² + eps)·weight + bias, with μ and the biased σ² of each channel over the
    concatenation of every replica's x along N. Replicas may hold different N and spatial sizes,
    or nothing. With a residual, y is that plus the residual; with relu, y = max(that, 0), in the
    same pass over memory. A ReLU's mask is computed again from x, so that BN and ReLU together
    keep one tensor of x's size for the backward pass; with a residual they keep y too.

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
        eps: added to σ² inside the square root; dimension of x². In float16 above 2.3e-10, where
            1/√eps, the gradient of a channel that does not vary, would overflow; a smaller one is
            warned of.
        process_group: the replicas; None means the default group, or this process alone where
            `torch.distributed` is not initialised.
        residual: added before the ReLU; of x's shape, dtype and device.
        relu: whether to return max(y, 0) in y's place.
        reducer: who sums over the replicas, the same on all of them: `shared_memory`,
            `process_group` or `auto`; None means the environment variable SYNCBN_REDUCER, or
            `auto`. See `syncbn.comm.reducer.select_reducer`.

    Returns:
        y, and the moments of the whole batch, which carry no gradient.

    Raises:
        InputError: x is not floating point, has fewer than two dimensions, or no channels, or the
            residual is not like x, or the reducer is impossible (on this replica, before anything
            is sent); or all replicas together hold one value per channel, whose
            variance is undefined (on every replica, after the reduction).
        ReplicaError: the all-reduce failed, or what the replicas sent does not belong together.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the gradient of
    section 3.
    """
    reason = reason_to_refuse(x)
    if residual is not None and not alike(x, residual):
        reason = (
            f"expected a residual like the input, of shape {tuple(x.shape)}, {x.dtype}, on "
            f"{x.device}; got {tuple(residual.shape)}, {residual.dtype}, on {residual.device}"
        )
    if reason:
        raise InputError(reason)
    call = Call(select_reducer(process_group, x.device, reducer), None, x.shape[1], x.dtype)
    y, moments = normalize(x, weight, bias, residual, eps, relu, call)
    assert moments is not None  # without a memory, there is nothing to repeat
    return y, moments


def reason_to_refuse(x: Tensor) -> str:
    """Return what is wrong with an input of any number of channels; '' for nothing."""
    if x.dim() < 2:
        return f"expected an input of shape (N, C, *), got {tuple(x.shape)}; add a batch dimension"
    if x.shape[1] == 0:
        return f"expected channels to normalise, got an input of shape {tuple(x.shape)}"
    if not x.is_floating_point():
        return f"expected a floating-point input, got {x.dtype}; convert it first"
    return ""


def alike(x: Tensor, residual: Tensor) -> bool:
    """Return whether a residual can be added in the same pass."""
    return residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    call: Call,
) -> tuple[Tensor, Moments | None]:
    """Do what `sync_batch_norm` does, on inputs that are known to be good, for a layer's call.

    Where the call has a memory, it betters and spares reductions. A call that repeats an earlier
    one for activation checkpointing does not communicate, and returns no moments.
    """
    if eps <= torch.finfo(x.dtype).max ** -2:
        warnings.warn(
            f"eps is {eps}: where a channel does not vary, the gradient is 1/√eps, which {x.dtype} "
            f"cannot hold; choose an eps above {torch.finfo(x.dtype).max ** -2:.1e}",
            stacklevel=4,
        )
    kernels = select_kernels()
    inputs = x, weight, bias, residual
    if isinstance(kernels, NativeKernels) and is_plain(*inputs):
        y: Tensor = NativeSyncBatchNorm.apply(*inputs, eps, relu, call)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
        return y, call.take_moments()
    outputs: tuple[Tensor, ...] = _SyncBatchNorm.apply(*inputs, eps, relu, kernels, call)  # pyright: ignore[reportAssignmentType] -- as above
    y, count, mean, m2, _ = outputs
    return y, None if call.replayed else Moments(count, mean, m2)


class _SyncBatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual) to (y, count, mean, m2, invstd); only y has a gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        relu: bool,
        kernels: Kernels,
        call: Call,
    ) -> tuple[Tensor, ...]:
        moments = global_moments(kernels.local_moments(x), call)
        require_two_values(moments.count, x[:, 0].numel(), call)
        invstd = torch.rsqrt(moments.variance() + eps)
        y = kernels.normalize(x, moments.mean, invstd, weight, bias, residual, relu)
        if torch.compiler.is_compiling():
            # torch 2.11 compiles a gradient of 0 for an output of in-place operations or of a cast
            # to the dtype that it has; the compiler fuses the copy away.
            y = y.clone(memory_format=torch.preserve_format)
        return y, moments.count, moments.mean, moments.m2, invstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, ctx.relu, ctx.kernels, ctx.call = inputs
        y, count, mean, m2, invstd = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(count, mean, m2, invstd)
        kept = masks(bias, residual, y, ctx.relu)
        ctx.save_for_backward(x, weight, *kept, count, mean, invstd)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        x, weight, bias, y, count, mean, invstd = ctx.saved_tensors
        saved = Saved(x, weight, bias, y, count, mean, invstd, ctx.relu)
        needs = ctx.needs_input_grad
        general = gradients(grads[0], saved, needs[0], ctx.kernels, ctx.call)
        return *general.of_inputs(needs, weight, ctx.bias_dtype), None, None, None, None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        relu: bool,
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
        inputs = (
            beside(x, in_dims[0], 1),
            *(beside(weight, in_dims[1], 0), beside(bias, in_dims[2], 0)),
            beside(residual, in_dims[3], 1),
        )
        outputs: tuple[Tensor, ...] = _SyncBatchNorm.apply(*inputs, eps, relu, kernels, together)  # pyright: ignore[reportAssignmentType] -- as above
        y, count, *vectors = outputs
        vectors = [vector.unflatten(0, (members, channels)) for vector in vectors]
        return (y.unflatten(1, (members, channels)), count, *vectors), (1, None, 0, 0, 0)


# torch binds the arguments of every call to the signature; found here, it need not be made anew.
_SyncBatchNorm.forward.__signature__ = inspect.signature(_SyncBatchNorm.forward)  # pyright: ignore[reportFunctionMemberAccess] -- what inspect documents for it
