"""The mean and the covariance of all replicas' batches together, with their gradient."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.comm.exchange import Exchange
from syncbn.ops.all_reduce import all_reduce


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


def global_covariance(values: Tensor, own: Tensor, exchange: Exchange) -> Covariance:
    """Return the mean and the covariance of all replicas' values together, as functions of them.

    With G_μ and G_S the gradients of mean and covariance, summed over replicas, n the count:
    dx = (G_μ + (G_S + G_Sᵀ)·(x − μ))/n. It can be differentiated in turn.

    Communicates: one all-reduce of 1 + C + C·(D + 1)/2 float64 forward, and one of
    C + C·(D + 1)/2 backward; none in a world of one, nor when activation checkpointing repeats a
    forward.

    Error: that of float64 sums about the mean of the batch that the layer remembers, or 0.

    Args:
        values: this replica's, less own: shape (C/D, D, n), float64.
        own: their mean, of which no gradient is taken: shape (C/D, D), float64.
        exchange: of the call.

    Raises:
        InputError: in compiled code, all replicas together hold a single value per channel.
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    outputs: tuple[Tensor, ...] = _GlobalCovariance.apply(values, own, exchange)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    return Covariance(*outputs)


@dataclass(frozen=True, eq=False)
class Comoments:
    """Count, means and products of deviations of channels in groups.

    Attributes:
        count: values per channel, 0-d.
        mean: shape (C,).
        products: Σ(x − mean)·(x − mean)ᵀ in each group, shape (C/D, D, D).
        scale: Σ|x − K|² in each group, shape (C/D,), for the K that the values were summed about:
            in proportion to this, the products were rounded.
    """

    count: Tensor
    mean: Tensor
    products: Tensor
    scale: Tensor


class _GlobalCovariance(torch.autograd.Function):
    """(values, own) to the tensors of `Covariance`."""

    @staticmethod
    def forward(values: Tensor, own: Tensor, exchange: Exchange) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        number, products = own.new_full((), values.shape[2]), values @ values.mT
        scale = products.diagonal(dim1=1, dim2=2).sum(1)
        local = Comoments(number, own.flatten(), products, scale)
        if exchange.world_size == 1:
            total = exchange.alone(lambda: local)
        else:
            total = exchange.sum_about(
                lambda shift: _to_summable(local, shift),
                lambda vector, shift: _from_summable(vector, shift, own.shape),
                own.device,
            )
        number = total.count.clamp(min=1)
        rounding = (exchange.world_size + 3) * 2.0**-52 * total.scale / number
        offset = torch.where(total.count > 0, total.mean - local.mean, 0.0).reshape(own.shape)
        return offset, total.products / number, total.count.clone(), total.mean.clone(), rounding

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, _, ctx.exchange = inputs
        offset, _, count, *_ = output
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(values, offset, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        values, offset, count = ctx.saved_tensors
        sums = torch.cat([grads[0].reshape(-1), _upper(grads[1] + grads[1].mT)])
        if torch.compiler.is_compiling():
            sums = ctx.exchange.sum(sums)
        else:
            sums = all_reduce(sums, ctx.exchange)
        sums = sums / count.clamp(min=1)
        of_mean, of_products = sums.split([offset.numel(), sums.numel() - offset.numel()])
        matrices = _symmetric(of_products, offset.shape[1])
        of_mean = of_mean.reshape(*offset.shape, 1) - matrices @ offset[..., None]
        return torch.baddbmm(of_mean, matrices, values), None, None


def _to_summable(local: Comoments, shift: Tensor | None) -> Tensor:
    offset = local.mean if shift is None else local.mean - shift
    column = offset.reshape(local.products.shape[:2])[..., None]
    second = local.products + local.count * (column @ column.mT)
    return torch.cat([local.count.reshape(1), local.count * offset, _upper(second)])


def _from_summable(vector: Tensor, shift: Tensor | None, shape: torch.Size) -> Comoments:
    """Return the comoments of all replicas' batches, of channels in groups of that shape."""
    number, channels = vector[0], shape.numel()
    first, second = vector[1 : channels + 1], _symmetric(vector[channels + 1 :], shape[1])
    distance = first / number.clamp(min=1)
    column = distance.reshape(shape)[..., None]
    return Comoments(
        number,
        distance if shift is None else torch.where(number > 0, shift + distance, distance),
        second - number * (column @ column.mT),
        second.diagonal(dim1=1, dim2=2).sum(1),
    )


def _upper(matrices: Tensor) -> Tensor:
    """Return the upper triangles of symmetric matrices, one after the other."""
    rows, columns = _upper_indices(matrices.shape[1], matrices.device)
    return matrices[:, rows, columns].reshape(-1)


def _symmetric(triangles: Tensor, size: int) -> Tensor:
    """Return the symmetric matrices, shape (*, size, size), of their upper triangles."""
    rows, columns = _upper_indices(size, triangles.device)
    # Where each element of a matrix stands in its triangle.
    places = torch.empty(size, size, dtype=torch.long, device=triangles.device)
    places[rows, columns] = places[columns, rows] = torch.arange(
        len(rows), dtype=torch.long, device=places.device
    )
    return triangles.reshape(-1, len(rows))[:, places]


def _upper_indices(size: int, device: torch.device) -> Tensor:
    return torch.triu_indices(size, size, dtype=torch.long, device=device)
