"""The gradient of batch normalization over all replicas, and what makes it differentiable again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.comm.exchange import Call, global_sum
from syncbn.kernels.protocol import Kernels, ReferenceKernels


@dataclass(frozen=True)
class Saved:
    """What a forward leaves for its backward.

    Attributes:
        x: the input.
        weight: γ; None for 1.
        bias: β, where a ReLU without a residual needs it to find its mask again.
        output: y, where a ReLU follows upon a residual, which is not kept: y tells the mask.
        count: of the whole batch, 0-d, float64.
        mean: of the whole batch, shape (C,), float64.
        invstd: 1/√(σ² + eps), shape (C,), float64.
        relu: whether a ReLU came last.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    output: Tensor | None
    count: Tensor
    mean: Tensor
    invstd: Tensor
    relu: bool


def masks(
    bias: Tensor | None, residual: Tensor | None, y: Tensor, relu: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return what `Saved` keeps of bias and output, which the ReLU's mask is found by."""
    if not relu:
        return None, None
    return (bias, None) if residual is None else (None, y)


class Gradients(NamedTuple):
    """Gradients of the four inputs, the parameters' in float64; dx is None if nobody needs it."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor
    residual: Tensor

    def of_inputs(
        self, needs: Sequence[bool], weight: Tensor | None, bias_dtype: torch.dtype | None
    ) -> tuple[Tensor | None, ...]:
        """Return those that are needed, in the dtypes of the inputs."""
        return (
            self.x,
            self.weight.to(weight.dtype) if weight is not None and needs[1] else None,
            self.bias.to(bias_dtype) if needs[2] else None,
            self.residual if needs[3] else None,
        )


def gradients(dy: Tensor, saved: Saved, needs_dx: bool, kernels: Kernels, call: Call) -> Gradients:
    """Return dx, and this replica's share of the parameters' gradients.

    In grad mode, when the result is to be differentiated in turn, everything is a PyTorch
    operation or one of the functions below, whose gradients lead over all replicas.

    Communicates: one all-reduce of 2C float64 where dx is needed; none in a world of one.
    """
    x, count, mean, invstd = saved.x, saved.count, saved.mean, saved.invstd
    add_up = global_sum
    if not torch.compiler.is_compiling() and not torch._C._has_storage(dy):  # pyright: ignore[reportPrivateUsage] -- nothing public tells
        # One of many upstream gradients at once, under vmap: the kernels, which write into copies
        # of x, need x as many times.
        x = torch.where(torch.ones_like(dy, dtype=torch.bool), x, dy)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        kernels, add_up = ReferenceKernels(), differentiable_sum
        mean, invstd = _as_function_of_x(x, count, mean, invstd, call)
    if saved.output is not None:
        dy = torch.ops.aten.threshold_backward(dy, saved.output, 0)
    gate = saved.bias, saved.relu and saved.output is None
    sum_dy, sum_dy_xhat = kernels.backward_reduce(dy, x, mean, invstd, saved.weight, *gate)
    dx = None
    if needs_dx:
        sums = add_up(torch.cat([sum_dy, sum_dy_xhat]), call) / count.clamp(min=1)
        mean_dy, mean_dy_xhat = sums.chunk(2)
        means = mean_dy, mean_dy_xhat
        dx = kernels.backward_input(dy, x, mean, invstd, saved.weight, *means, *gate)
    return Gradients(dx, sum_dy_xhat, sum_dy, dy)


def _as_function_of_x(
    x: Tensor, count: Tensor, mean: Tensor, invstd: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Return mean and invstd, of values known already, as what they are: functions of x."""
    outputs: tuple[Tensor, Tensor] = _Statistics.apply(x, count, mean, invstd, call)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
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
        sums = differentiable_sum(torch.cat(grads), ctx.call) / count.clamp(min=1)
        dmean, dinvstd = sums.chunk(2)
        # The kernel's formula with dy = 0 and a weight of 1.
        dx = ReferenceKernels().backward_input(
            torch.zeros_like(x), x, mean, invstd, None, -dmean / invstd, dinvstd * invstd
        )
        return dx, None, None, None, None


def differentiable_sum(vector: Tensor, call: Call, direction: str = "backward") -> Tensor:
    """Return the sum over replicas, whose gradient is the sum of all replicas' gradients.

    Communicates: one all-reduce of the vector, and one for its gradient; none in a world of one.

    Raises:
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    if call.reducer.world_size == 1:
        return vector
    total: Tensor = _GlobalSum.apply(vector, call, direction)  # pyright: ignore[reportAssignmentType] -- as above
    return total


class _GlobalSum(torch.autograd.Function):
    """The sum over replicas; what depends on it anywhere depends on every replica's share."""

    @staticmethod
    def forward(vector: Tensor, call: Call, direction: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return global_sum(vector, call, direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.call, _ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return differentiable_sum(grads[0], ctx.call), None, None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        info: Any, in_dims: tuple[int | None, ...], vector: Tensor, call: Call, direction: str
    ) -> tuple[Tensor, int | None]:
        return differentiable_sum(vector, call, direction), in_dims[0]
