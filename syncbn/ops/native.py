"""`functional` for plain tensors on the CPU: one call of the native library a stage.

The arithmetic is that of the general function. What differs is the overhead, which on small inputs
is most of the time there: no operation of torch's on vectors of C values, and the count a number.
"""

from typing import Any

import torch
from torch import Tensor

from syncbn import _native
from syncbn.comm.exchange import (
    Call,
    Reduction,
    Statistics,
    global_sum,
    require_same_call,
    single_value,
    sum_forward,
)
from syncbn.kernels.native import Parameters, is_plain, laid_out_as, source
from syncbn.kernels.protocol import ReferenceKernels
from syncbn.moments import COUNT_LIMIT, PackedMoments
from syncbn.ops.generic import Saved, gradients, masks


class NativeSyncBatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual) to y, for inputs that are plain; see `kernels.native.is_plain`.

    Leaves the moments in `call.moments`.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx: Any, *args: Any)
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        relu: bool,
        call: Call,
    ) -> Tensor:
        """Return y, and keep what the backward pass reads."""
        library = _native.library
        assert library is not None  # or there would be no native kernels
        kind, address, *shape_and_threads = tensor = source(x)
        statistics = _global_statistics(x.device, tensor, eps, call)
        mean_invstd = statistics.mean_invstd
        y, parameters = torch.empty_like(x), Parameters.of(weight, bias)
        if residual is not None:
            residual = laid_out_as(x, residual)
        pointer = mean_invstd.data_ptr()
        library.syncbn_normalize(
            *(kind, address, None if residual is None else residual.data_ptr(), y.data_ptr()),
            *shape_and_threads,
            *(pointer, pointer + 8 * call.channels, *parameters.pointers(), relu),
        )
        ctx.save_for_backward(x, weight, *masks(bias, residual, y, relu), mean_invstd)
        ctx.count, ctx.relu, ctx.call = statistics.count, relu, call
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        """Return the gradients; through `differentiable` where something is not plain now."""
        x, weight, bias, y, mean_invstd = ctx.saved_tensors
        needs, call, channels = ctx.needs_input_grad, ctx.call, x.shape[1]
        if torch.is_grad_enabled() or not is_plain(x, dy):
            count = torch.tensor(ctx.count, dtype=torch.float64)
            mean, invstd = mean_invstd.chunk(2)
            saved = Saved(x, weight, bias, y, count, mean, invstd, ctx.relu)
            general = gradients(dy, saved, needs[0], ReferenceKernels(), call)
            return *general.of_inputs(needs, weight, ctx.bias_dtype), None, None, None
        library = _native.library
        assert library is not None  # as in forward
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        dy = laid_out_as(x, dy)
        relu = ctx.relu and y is None
        kind, *tensor = source(x)
        pointer, parameters = mean_invstd.data_ptr(), Parameters.of(weight, bias)
        by = pointer, pointer + 8 * channels, *parameters.pointers(), relu
        sums = torch.empty(2 * channels, dtype=torch.float64)
        dweight = torch.empty(channels) if needs[1] else None
        dbias = torch.empty(channels) if needs[2] else None
        pointer = sums.data_ptr()
        library.syncbn_backward_reduce(
            *(kind, dy.data_ptr(), *tensor, *by, pointer, pointer + 8 * channels),
            None if dbias is None else dbias.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
        )
        dx = None
        if needs[0]:
            dx, total = torch.empty_like(x), global_sum(sums, call)
            address, *shape_and_threads = tensor
            pointer = total.data_ptr()
            library.syncbn_backward_input(
                *(kind, dy.data_ptr(), address, dx.data_ptr(), *shape_and_threads, *by),
                *(pointer, pointer + 8 * channels, ctx.count),
            )
        if dweight is not None and weight.dtype is not torch.float32:
            dweight = sums[channels:].to(weight.dtype)
        if dbias is not None and ctx.bias_dtype is not torch.float32:
            dbias = sums[:channels].to(ctx.bias_dtype)
        return dx, dweight, dbias, dy if needs[3] else None, None, None, None


def _global_statistics(
    device: torch.device, tensor: tuple[int, ...], eps: float, call: Call
) -> Statistics:
    """Return the whole batch's count, mean and invstd, and leave its moments in `call.moments`.

    Args:
        device: of the input.
        tensor: the input, as `source` describes it.
        eps: added to the variance.
        call: of the layer.
    """
    library = _native.library
    assert library is not None  # as above
    reducer, memory, channels = call.reducer, call.memory, call.channels
    world_size = reducer.world_size
    shift = None
    if memory is not None and world_size > 1:
        shift = memory.shift_for(channels, device)
    shift_pointer = None if shift is None else shift.data_ptr()
    vector = torch.empty(2 * channels + 1, dtype=torch.float64)
    ours = *tensor, shift_pointer, reducer.rank, world_size, vector.data_ptr()
    digest: int = library.syncbn_summable_moments(*ours)
    if memory is not None:
        earlier = memory.recall(digest)
        if earlier is not None and isinstance(earlier.result, Statistics):
            call.reduction, call.replayed = earlier, True
            return earlier.result
    mean_invstd = torch.empty(2 * channels, dtype=torch.float64)

    def finish(total: Tensor) -> float:
        """Turn the sum into moments, in place, and statistics; return the count."""
        arguments = shift_pointer, channels, eps, mean_invstd.data_ptr()
        return library.syncbn_global_moments(total.data_ptr(), world_size > 1, *arguments)

    total = sum_forward(vector, call) if world_size > 1 else vector
    count = finish(total)
    if not 0 <= count < COUNT_LIMIT:
        require_same_call(call)
        # As in `reduction.global_moments`: once more, about 0.
        if shift is not None:
            shift.zero_()
        library.syncbn_summable_moments(*ours)
        total = sum_forward(vector, call)
        count = finish(total)
    if count == 1:
        raise single_value()
    call.moments = PackedMoments(total)
    statistics = Statistics(count, mean_invstd)
    if memory is not None:
        call.reduction = Reduction(digest, statistics)
        memory.keep(call.reduction)
    return statistics
