"""`sync_batch_norm`: batch normalization over all replicas, with its true gradient."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn._native.plain import has_memory, is_unobserved, transforming
from syncbn.comm.exchange import Exchange
from syncbn.comm.reducer import select_reducer
from syncbn.errors import InputError
from syncbn.kernels.choice import select_kernels, select_merging
from syncbn.kernels.native import PLAIN, NativeKernels, can_read
from syncbn.kernels.protocol import Kernels, Masking, Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments, from_summable, to_summable
from syncbn.ops.all_reduce import all_reduce
from syncbn.ops.derivatives import as_function_of, tangent

_UNSHARDED = (Tensor, nn.Parameter, type(None))
# The smallest eps whose 1/√eps the dtype can hold.
_LEAST_EPS = {
    dtype: torch.finfo(dtype).max ** -2
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


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
    """Normalize x by the mean and variance of the batch that all replicas hold together.

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
    rounding. `SyncBatchNorm` remembers a better center; see docs/numerics.md.

    Args:
        x: shape (N, C, *), floating point, any memory format; y keeps dtype and format.
        weight: γ, shape (C,), any floating dtype; None means 1.
        bias: β, shape (C,), any floating dtype; None means 0.
        eps: added to σ² inside the square root; dimension of x². In float16 above 2.3e-10, where
            1/√eps, the gradient of a channel that does not vary, would overflow; a smaller one is
            warned of.
        process_group: the replicas; None means the default group, or this process alone where
            `torch.distributed` is not initialized.
        residual: added before the ReLU; of x's shape, dtype and device.
        relu: whether to return max(y, 0) in y's place.
        reducer: who sums over the replicas, the same on all of them: `shared_memory`,
            `process_group`, `symmetric_memory` or `auto`; None means the environment variable
            SYNCBN_REDUCER, or `auto`. See `syncbn.comm.reducer.select_reducer`.

    Returns:
        y, and the moments of the whole batch, which carry no gradient.

    Raises:
        InputError: x is not floating point, has fewer than two dimensions, or no channels, or the
            residual is not like x, or weight or bias not of shape (C,), or the reducer is
            impossible (on this replica, before anything is sent); or all replicas together hold one
            value per channel, whose variance is undefined (on every replica, after the reduction).
        ReplicaError: the all-reduce failed, or what the replicas sent does not belong together.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the gradient of
    section 3.
    """
    reason = reason_to_refuse(x) or reason_to_refuse_sharded(weight, bias, residual)
    if residual is not None and not reason and not alike(x, residual):
        reason = (
            f"expected a residual like the input, of shape {tuple(x.shape)}, {x.dtype}, on "
            f"{x.device}; got {tuple(residual.shape)}, {residual.dtype}, on {residual.device}"
        )
    if reason := reason or reason_to_refuse_parameters(x, weight, bias):
        raise InputError(reason)
    sums = select_reducer(process_group, x.device, reducer)
    exchange = Exchange(sums, None, x.shape[1], x.dtype)
    kernels = select_kernels(x, weight, bias, residual)
    moments = global_moments(x, kernels, exchange)
    y = normalize(x, moments, weight, bias, residual, eps, relu, kernels, exchange)
    return y, moments


def reason_to_refuse(x: Tensor) -> str:
    """Return what is wrong with an input of any number of channels; '' for nothing."""
    shape = x.shape
    if len(shape) < 2:
        return f"expected an input of shape (N, C, *), got {tuple(shape)}; add a batch dimension"
    if shape[1] == 0:
        return f"expected channels to normalize, got an input of shape {tuple(shape)}"
    if not x.is_floating_point():
        return f"expected a floating-point input, got {x.dtype}; convert it first"
    return reason_to_refuse_sharded(x)


def reason_to_refuse_sharded(*tensors: Tensor | None) -> str:
    """Return what is wrong if one of the tensors is a DTensor; '' for nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return ""  # then there are no such tensors
    for tensor in tensors:
        if type(tensor) not in _UNSHARDED and isinstance(tensor, module.DTensor):
            return (
                "expected tensors of this replica's share, got a DTensor, whose placement a "
                "synchronized layer does not know; pass x.to_local() of an input that is sharded "
                "along N, keep parameters whole, and wrap the result by DTensor.from_local"
            )
    return ""


def reason_to_refuse_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Return what is wrong with the parameters for an input that is good; '' for nothing.

    The native kernels read as many values as the input has channels, whether they are there or not.
    """
    channels = x.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.dim() != 1 or parameter.numel() != channels):
            shape = tuple(parameter.shape)
            return (
                f"expected a {name} of shape ({channels},) like the input's channels, got {shape}"
            )
    return ""


def alike(x: Tensor, residual: Tensor) -> bool:
    """Return whether a residual can be added in the same pass."""
    return residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device


def global_moments(x: Tensor, kernels: Kernels, exchange: Exchange) -> Moments:
    """Return the moments of all replicas' batches together, bit-identical on all of them.

    They carry no gradient: `normalize` knows how they depend on x.

    Communicates: one all-reduce of 2C + 1 float64, or, on GPUs of up to 32 replicas, one all-gather
    of 2C + 2; none in a world of one, nor when activation checkpointing repeats a forward.

    Raises:
        InputError: all replicas together hold a single value per channel.
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    if kernels is PLAIN:  # torch does not see what they do
        return _global_moments(x, kernels, exchange)
    if transforming() and not torch.compiler.is_compiling():
        packed: Tensor = _GlobalMoments.apply(x.detach(), kernels, exchange)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
        return Moments(packed)
    with torch.no_grad():
        return _global_moments(x.detach(), kernels, exchange)


def _global_moments(x: Tensor, kernels: Kernels, exchange: Exchange) -> Moments:
    count = x.numel() // x.shape[1]
    if exchange.reducer.world_size == 1:
        moments = exchange.alone(partial(kernels.local_moments, x))
    elif exchange.gathers(x.device):
        merge = select_merging(x.device).merge
        moments = exchange.gather(partial(kernels.row, x), merge, x.device)
    elif torch.compiler.is_compiling():  # which packs twice, see `Exchange.sum_about`
        local = kernels.local_moments(x)
        moments = exchange.sum_about(partial(to_summable, local), from_summable, x.device)
    else:

        def pack(shift: Tensor | None) -> Tensor:
            return to_summable(kernels.local_moments(x), shift)

        moments = exchange.sum_about(pack, from_summable, x.device)
    if count <= 1:
        exchange.require_two_values(moments.count, count)
    return moments


def normalize(
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    kernels: Kernels,
    exchange: Exchange,
) -> Tensor:
    """Return y of `sync_batch_norm`, as a function of x, weight, bias and residual.

    Args:
        x: shape (N, C, *), as of all inputs known to be good.
        moments: what `global_moments` gives for x, on which y depends by x.
        weight: γ, shape (C,); None means 1.
        bias: β, shape (C,); None means 0.
        residual: of x's shape, dtype and device; None means 0.
        eps: added to the variance.
        relu: whether to return max(y, 0) instead of y.
        kernels: compute.
        exchange: of the call; sums in the backward pass.
    """
    if eps <= _LEAST_EPS.get(x.dtype, 0.0):
        warnings.warn(
            f"eps is {eps}: if a channel does not vary, the gradient is 1/√eps, which {x.dtype} "
            f"cannot hold; choose an eps above {_LEAST_EPS[x.dtype]:.1e}",
            stacklevel=4,
        )
    norm = kernels.normalization(moments, weight, bias, relu, eps)
    function: Any = _BatchNorm
    if torch.compiler.is_compiling():
        function = _CompiledBatchNorm
    elif transforming():
        function = _TransformedBatchNorm
    return function.apply(
        x, weight, bias, residual, norm.statistics, norm.coefficients, relu, kernels, exchange
    )


class _BatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, statistics, …) to y; the statistics are those of x."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        x, weight, bias, residual, statistics, coefficients, relu, kernels, _ = inputs
        norm = Normalization(statistics, weight, bias, relu, coefficients)
        y = kernels.normalize(x, norm, residual)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        return _gradients(ctx, grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return tangent(ctx, *tangents)


class _CompiledBatchNorm(torch.autograd.Function):
    """The same for torch.compile, which takes no function with a tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
        coefficients: Tensor | None,
        relu: bool,
        kernels: Kernels,
        exchange: Exchange,
    ) -> Tensor:
        norm = Normalization(statistics, weight, bias, relu, coefficients)
        y = kernels.normalize(x, norm, residual)
        if torch.compiler.is_compiling() and not kernels.can_compute(x, weight, bias, residual):
            # torch 2.11 compiles a gradient of 0 for an output of in-place operations or of a cast
            # to the dtype that it has; the compiler fuses the copy away.
            y = y.clone(memory_format=torch.preserve_format)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return _gradients(ctx, grads[0])


class _TransformedBatchNorm(_CompiledBatchNorm):
    """The same for the transforms of torch.func, which want the context set up apart."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return tangent(ctx, *tangents)


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    """Save what the backward pass reads; the same number of tensors, whoever computes."""
    x, weight, bias, residual, statistics, _, relu, ctx.kernels, ctx.exchange = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The ReLU's mask is found again from x and the bias, unless a residual was added, or a tangent
    # needs y itself.
    forward_mode = _forward_mode()
    ctx.relu = relu and residual is None and not forward_mode
    kept_bias = bias if ctx.relu else None
    kept_output = y if relu and not ctx.relu else None
    saved = x, weight, kept_bias, kept_output, statistics
    ctx.save_for_backward(*saved)
    if forward_mode:
        ctx.save_for_forward(*saved)  # the same: vmap knows the axis of members of one list alone


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return dx, this replica's share of the parameters' gradients, and the residual's gradient.

    Communicates: one all-reduce of 2C float64 if dx is needed; none in a world of one.
    """
    x, weight, bias, y, statistics = ctx.saved_tensors
    needs, exchange = ctx.needs_input_grad, ctx.exchange
    kernels: Kernels = ctx.kernels
    masking = None
    if y is not None:
        if kernels.masks and is_unobserved() and has_memory(dy) and not torch.is_grad_enabled():
            masking = Masking(y, torch.empty_like(x))
        else:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
    norm = Normalization(statistics, weight, bias, ctx.relu)
    marks = exchange.marks("backward", x.device) if needs[0] else None
    add_up: Callable[[Tensor], Tensor] = partial(exchange.sum, marked=marks is not None)
    if kernels is PLAIN and not (is_unobserved() and can_read(x, dy, weight, bias)):
        kernels = NativeKernels()  # they look for themselves
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not has_memory(dy)):
        norm = as_function_of(x, norm, exchange)
        kernels, add_up, marks = ReferenceKernels(), partial(all_reduce, exchange=exchange), None
    dweight = dbias = None
    if kernels.parameter_dtypes and not torch.compiler.is_compiling():
        if needs[1] and weight.dtype in kernels.parameter_dtypes:
            dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if needs[2] and ctx.bias_dtype in kernels.parameter_dtypes:
            dbias = torch.empty(x.shape[1], dtype=ctx.bias_dtype, device=x.device)
        # Nobody reads this replica's sums any more then.
        spent = bool(needs[1]) == (dweight is not None) and bool(needs[2]) == (dbias is not None)
        add_up = partial(add_up, overwrite=spent)
    add_up_dx = add_up if needs[0] else None
    sums, dx = kernels.gradients(dy, x, norm, dweight, dbias, add_up_dx, marks, masking)
    if masking is not None:
        dy = masking.masked
    if needs[1] and dweight is None:
        assert weight is not None  # as its gradient is needed
        dweight = sums.chunk(2)[1].to(weight.dtype)
    if needs[2] and dbias is None:
        dbias = sums.chunk(2)[0].to(ctx.bias_dtype)
    return dx, dweight, dbias, dy if needs[3] else None, None, None, None, None, None


class _GlobalMoments(torch.autograd.Function):
    """x to the moments of all replicas' batches, inside function transforms; without a gradient."""

    @staticmethod
    def forward(x: Tensor, kernels: Kernels, exchange: Exchange) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return _global_moments(x, kernels, exchange).packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return None, None, None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, kernels: Kernels, exchange: Exchange
    ) -> tuple[Tensor, int]:
        """Return the moments of an ensemble, whose members stand beside each other as channels."""
        assert in_dims[0] is not None  # x is the only tensor
        together = x.movedim(in_dims[0], 1).flatten(1, 2)
        moments = Moments(
            _GlobalMoments.apply(together, kernels, exchange.of_members(info.batch_size))  # pyright: ignore[reportArgumentType] -- as above
        )
        members = (info.batch_size, -1)
        count = moments.count.expand(info.batch_size, 1)
        return torch.cat([count, moments.mean.view(members), moments.m2.view(members)], 1), 0


def _forward_mode() -> bool:
    """Return whether tangents may be on their way, for which alone tensors are saved."""
    return transforming() or torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage] -- nothing public tells
