"""What batch normalization's derivatives need to be differentiated in turn, and its tangent."""

from typing import Any

import torch
from torch import Tensor

from syncbn.comm.exchange import Exchange
from syncbn.errors import InputError
from syncbn.kernels.protocol import Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.ops.all_reduce import all_reduce


def tangent(
    ctx: Any,
    of_x: Tensor | None,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    of_residual: Tensor | None,
    *_: Any,
) -> Tensor:
    """Return the tangent of y; as a matrix, ∂y/∂x is symmetric, so that dx's formula serves.

    Communicates: one all-reduce of 2C float64 if x has a tangent, which every replica must give or
    none; none in a world of one.

    Raises:
        InputError: it is a tangent of a tangent, for which torch would take 0.
    """
    levels: list[Any] = torch._C._functorch.get_interpreter_stack() or []  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- nothing public tells
    if sum(level.key().name == "Jvp" for level in levels) > 1:
        raise InputError(
            "batch normalization cannot take tangents of tangents, such as jacfwd(jacfwd(f)); take "
            "jacfwd(jacrev(f)), which is torch.func.hessian, or jacrev(jacfwd(f))"
        )
    x, weight, _, y, statistics = ctx.saved_tensors
    norm = as_function_of(x, Normalization(statistics, weight), ctx.exchange)
    kernels = ReferenceKernels()
    result = torch.zeros_like(x)
    if of_x is not None:
        sums = all_reduce(kernels.backward_reduce(of_x, x, norm), ctx.exchange)
        result = result + kernels.backward_input(of_x, x, norm, sums)
    if of_weight is not None or of_bias is not None:
        scale = torch.zeros_like(norm.mean) if of_weight is None else of_weight
        result = result + kernels.normalize(x, Normalization(norm.statistics, scale, of_bias))
    if of_residual is not None:
        result = result + of_residual
    return result if y is None else result.masked_fill(y <= 0, 0)


def as_function_of(x: Tensor, norm: Normalization, exchange: Exchange) -> Normalization:
    """Return a normalization whose statistics are what they are: functions of x.

    For what is differentiated in turn: then everything is a PyTorch operation, or a function whose
    gradients lead over all replicas.
    """
    statistics: Tensor = _Statistics.apply(x, norm.statistics, exchange)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
    return norm._replace(statistics=statistics)


class _Statistics(torch.autograd.Function):
    """x to its statistics: ∂mean/∂x = 1/n and ∂invstd/∂x = −invstd³·(x − mean)/n, n = count."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, statistics: Tensor, exchange: Exchange) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        return statistics.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.exchange = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x, statistics = ctx.saved_tensors
        norm = Normalization(statistics)
        _, dmean, dinvstd = grads[0].split([1, *[norm.mean.shape[0]] * 2])
        dmean, dinvstd = all_reduce(torch.cat([dmean, dinvstd]), ctx.exchange).chunk(2)
        # The formula of dx with dy = 0 and a weight of 1.
        sums = torch.cat([-dmean / norm.invstd, dinvstd * norm.invstd])
        return ReferenceKernels().backward_input(torch.zeros_like(x), x, norm, sums), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        x, statistics = ctx.saved_tensors
        norm = Normalization(statistics)
        sums = all_reduce(ReferenceKernels().backward_reduce(tangents[0], x, norm), ctx.exchange)
        of_mean, of_xhat = (sums / norm.total.clamp(min=1)).chunk(2)
        zero = torch.zeros_like(sums[:1])
        return torch.cat([zero, of_mean, -norm.invstd.square() * of_xhat])
