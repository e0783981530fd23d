"""Sums over all replicas as functions, which can be differentiated any number of times."""

from typing import Any

import torch
from torch import Tensor

from syncbn.comm.exchange import Exchange


def all_reduce(vector: Tensor, exchange: Exchange) -> Tensor:
    """Return the sum over replicas, whose gradient is the sum of all replicas' gradients.

    What depends on the sum anywhere depends on every replica's vector. Its tangent, in forward
    mode, is the sum of all replicas' tangents.

    Communicates: one all-reduce of the vector, and one for each gradient or tangent; none in a
    world of one. Under `torch.vmap`, one for all members together.

    Raises:
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    if exchange.world_size == 1:
        return vector
    total: Tensor = _AllReduce.apply(vector, exchange)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    return total


def checked_all_reduce(vector: Tensor, tag: Tensor, exchange: Exchange) -> Tensor:
    """Return `all_reduce` of a vector that begins with a count, if all replicas pass one tag.

    Args:
        vector: the count and sums, float64.
        tag: what the sums are of, float64; see `Exchange.sum_about`.
        exchange: of the call.

    Raises:
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    if exchange.world_size == 1:
        return vector
    total: Tensor = _AllReduce.apply(vector, exchange, tag)  # pyright: ignore[reportAssignmentType] -- as above
    return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(vector: Tensor, exchange: Exchange, tag: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        if tag is None:
            return exchange.sum(vector)
        return exchange.sum_about(
            lambda _: vector.clone(), lambda total, _: total, vector.device, tag
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.exchange = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return all_reduce(grads[0], ctx.exchange), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return all_reduce(tangents[0], ctx.exchange)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any,
        in_dims: tuple[int | None, ...],
        vector: Tensor,
        exchange: Exchange,
        tag: Tensor | None = None,
    ) -> tuple[Tensor, int | None]:
        assert tag is None  # of a penalty alone, which has no rule for ensembles
        return all_reduce(vector, exchange), in_dims[0]
