"""The mean and the covariance of all replicas' batches together, with their gradient."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.comm.exchange import (
    Call,
    checked_sum,
    compiled_call,
    global_sum,
    group_name,
    remembered,
    single_value,
    sum_forward,
)
from syncbn.moments import Moments, add_fingerprint
from syncbn.ops.generic import differentiable_sum


class Covariance(NamedTuple):
    """What is known of all replicas' values together; offset and covariance have gradients.

    Attributes:
        offset: the mean less this replica's own, shape (C/D, D).
        covariance: biased, of the channels of each group, shape (C/D, D, D).
        total: values per channel, 0-d.
        mean: shape (C,).
        rounding: how far rounding may have moved the covariance's eigenvalues, shape (C/D,).
    """

    offset: Tensor
    covariance: Tensor
    total: Tensor
    mean: Tensor
    rounding: Tensor


def global_covariance(values: Tensor, own: Tensor, call: Call) -> Covariance:
    """Return the mean and the covariance of all replicas' values together, as functions of them.

    With G_μ and G_S the gradients of mean and covariance, summed over replicas, n the count:
    dx = (G_μ + (G_S + G_Sᵀ)·(x − μ))/n. It can be differentiated in turn.

    Communicates: one all-reduce of 1 + C + C·(D + 1)/2 float64 forward, and one of
    C + C·(D + 1)/2 backward; none in a world of one, nor when activation checkpointing repeats a
    forward.

    Error: that of float64 sums about the mean of the batch that the call's memory knows, or 0.

    Args:
        values: this replica's, less own: shape (C/D, D, n), float64.
        own: their mean, of which no gradient is taken: shape (C/D, D), float64.
        call: who takes part, and who remembers.

    Raises:
        InputError: in compiled code, all replicas together hold a single value per channel.
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    outputs: tuple[Tensor, ...] = _GlobalCovariance.apply(values, own, call)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    return Covariance(*outputs)


@dataclass(frozen=True)
class Comoments(Moments):
    """Moments of channels in groups, whose m2 holds the products of deviations as well.

    Attributes:
        count: values per channel, 0-d.
        mean: shape (C,).
        m2: Σ(x − mean)·(x − mean)ᵀ in each group, shape (C/D, D, D).
        scale: Σ|x − K|² in each group, shape (C/D,), for the K that the values were summed about:
            in proportion to this, m2 was rounded.
    """

    scale: Tensor


class _GlobalCovariance(torch.autograd.Function):
    """(values, own) to the tensors of `Covariance`."""

    @staticmethod
    def forward(values: Tensor, own: Tensor, call: Call) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        number, products = own.new_full((), values.shape[2]), values @ values.mT
        scale = products.diagonal(dim1=1, dim2=2).sum(1)
        local = Comoments(number, own.flatten(), products, scale)
        total = remembered(local, call, partial(_reduced, local, call))
        assert isinstance(total, Comoments)
        number = total.count.clamp(min=1)
        rounding = (call.reducer.world_size + 3) * 2.0**-52 * total.scale / number
        offset = torch.where(total.count > 0, total.mean - local.mean, 0.0).reshape(own.shape)
        return offset, total.m2 / number, total.count.clone(), total.mean.clone(), rounding

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, _, ctx.call = inputs
        offset, _, count, *_ = output
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(values, offset, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        values, offset, count = ctx.saved_tensors
        add_up = global_sum if torch.compiler.is_compiling() else differentiable_sum
        sums = torch.cat([grads[0].reshape(-1), _upper(grads[1] + grads[1].mT)])
        sums = add_up(sums, ctx.call) / count.clamp(min=1)
        of_mean, of_products = sums.split([offset.numel(), sums.numel() - offset.numel()])
        matrices = _symmetric(of_products, offset.shape[1])
        of_mean = of_mean.reshape(*offset.shape, 1) - matrices @ offset[..., None]
        return torch.baddbmm(of_mean, matrices, values), None, None


def _reduced(local: Comoments, call: Call, shift: Tensor | None) -> Comoments:
    """Return the comoments of all replicas' batches together; None for the shift stands for 0."""
    if call.reducer.world_size == 1:
        return local
    tensors = local.count, local.mean, local.m2, shift
    if torch.compiler.is_compiling():
        return Comoments(*torch.ops.syncbn.global_comoments(*tensors, group_name(call.reducer)))
    return _summed(*tensors, call)


def _summed(count: Tensor, mean: Tensor, m2: Tensor, shift: Tensor | None, call: Call) -> Comoments:
    about = torch.zeros_like(mean) if shift is None else shift
    offset = (mean - about).reshape(m2.shape[:2])[..., None]
    second = m2 + count * (offset @ offset.mT)
    vector = torch.cat([count.reshape(1), count * offset.flatten(), _upper(second)])
    reducer = call.reducer
    fingerprinted = add_fingerprint(vector, shift, reducer.rank, reducer.world_size)
    total = checked_sum(sum_forward(fingerprinted, call), call)
    if total is None:  # as in `syncbn.comm.exchange`
        return _summed(count, mean, m2, None, call)
    number, channels = total[0], mean.numel()
    first, second = total[1 : channels + 1], _symmetric(total[channels + 1 :], m2.shape[1])
    distance = first / number.clamp(min=1)
    column = distance.reshape(offset.shape)
    return Comoments(
        number,
        torch.where(number > 0, about + distance, distance),
        second - number * (column @ column.mT),
        second.diagonal(dim1=1, dim2=2).sum(1),
    )


def _upper(matrices: Tensor) -> Tensor:
    """Return the upper triangles of symmetric matrices, one after the other."""
    rows, columns = torch.triu_indices(*matrices.shape[1:], device=matrices.device)
    return matrices[:, rows, columns].reshape(-1)


def _symmetric(triangles: Tensor, size: int) -> Tensor:
    """Return the symmetric matrices, shape (*, size, size), of their upper triangles."""
    rows, columns = torch.triu_indices(size, size, device=triangles.device)
    # Where each element of a matrix stands in its triangle.
    places = torch.empty(size, size, dtype=torch.long, device=triangles.device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=places.device)
    return triangles.reshape(-1, len(rows))[:, places]


# What torch.compile puts into its graphs, as it does `syncbn::global_moments`.
@torch.library.custom_op("syncbn::global_comoments", mutates_args=())
def _global_comoments(
    count: Tensor, mean: Tensor, m2: Tensor, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _summed(count, mean, m2, shift, compiled_call(mean, group_name))
    if total.count.device.type == "cpu" and total.count == 1:
        raise single_value()
    return total.count.clone(), total.mean, total.m2, total.scale


@_global_comoments.register_fake
def _(
    count: Tensor, mean: Tensor, m2: Tensor, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = m2.new_empty(m2.shape[0])
    return torch.empty_like(count), torch.empty_like(mean), torch.empty_like(m2), scale
