"""The kernels in PyTorch operations: readable, on any device, the yardstick for the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn._native.plain import has_memory, transforming
from syncbn.kernels.protocol import Kernels, Normalization
from syncbn.moments import Moments


class _Centered(NamedTuple):
    """x − head, and what is left of the mean: x − mean = values − rest."""

    values: Tensor
    rest: Tensor


class ReferenceKernels(Kernels):
    """Batch normalization's kernels as PyTorch operations; see `Kernels` in `protocol.py`.

    float16 and bfloat16 are computed in float32, float32 and float64 in their own precision; every
    sum over a batch is accumulated in float64. The mean is subtracted in two parts, head and rest,
    because rounding it to float32 alone costs |mean|/σ · 2⁻²⁴ of every normalized value.
    """

    def can_compute(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return False: they are the reference."""
        return False

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x, shape (N, C, *), in two passes.

        The first pass gives a shift c near the mean, in the compute precision; the second sums
        d = x − c: mean = c + Σd/n, M2 = Σd² − n·(mean − c)².
        """
        axes = _batch_axes(x)
        count = x.numel() // x.shape[1]
        divisor = max(count, 1)  # an empty batch has zero sums, hence mean 0 and M2 0
        values = x.to(_compute_dtype(x))
        near = values.sum(axes) / divisor
        deviation = values - _per_channel(near, x)
        error = deviation.sum(axes, dtype=torch.float64) / divisor
        m2 = torch.linalg.vector_norm(deviation, 2, axes, dtype=torch.float64).square()
        m2 = (m2 - count * error.square()).clamp(min=0)
        total = torch.full((), float(count), dtype=torch.float64, device=x.device)
        return Moments.of(total, near.double() + error, m2)

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """Return (x − mean)·invstd·weight + bias + residual, or max(·, 0), in x's dtype, format."""
        values, rest = _center(x, norm.mean)
        scale = norm.invstd if norm.weight is None else norm.invstd * norm.weight
        offset = -rest * scale if norm.bias is None else norm.bias - rest * scale
        y = _affine(values, _per_channel(scale, x), _per_channel(offset, x))
        if residual is not None:
            y = y + residual
        if norm.relu:
            y = y.relu()
        return y.to(x.dtype)

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return Σdy and Σdy·x̂ over this replica, shape (2C,), float64."""
        axes = _batch_axes(x)
        if norm.relu:
            dy = self._gated(dy, x, norm)
        values, rest = _center(x, norm.mean)
        sum_dy = dy.sum(axes, dtype=torch.float64)
        sum_dy_centered = (values * dy).sum(axes, dtype=torch.float64) - rest * sum_dy
        return torch.cat([sum_dy, sum_dy_centered * norm.invstd])

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """Return dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), in x's dtype and format."""
        if norm.relu:
            dy = self._gated(dy, x, norm)
        mean_dy, mean_dy_xhat = (sums / norm.total.clamp(min=1)).chunk(2)
        values, rest = _center(x, norm.mean)
        scale = norm.invstd if norm.weight is None else norm.invstd * norm.weight
        slope = norm.invstd * mean_dy_xhat  # x̂·mean_dy_xhat = (values − rest)·slope
        offset = scale * (rest * slope - mean_dy)
        dx = _affine(values, _per_channel(-scale * slope, x), _per_channel(offset, x))
        return torch.addcmul(dx, dy.to(dx.dtype), _per_channel(scale, x)).to(x.dtype)

    def update_running(
        self,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        momentum: float | None,
    ) -> None:
        """Move running statistics, in place, towards the moments of a batch.

        Without a branch on the count, which would make the host wait for a GPU.
        """
        with torch.no_grad():  # and not as a decorator, which torch.compile does not see through
            seen = moments.count > 0
            num_batches_tracked.add_(seen)
            share: Tensor | float = 0.0 if momentum is None else momentum
            if momentum is None:
                share = 1.0 / num_batches_tracked.clamp(min=1).double()
            for running, batch in (
                (running_mean, moments.mean),
                (running_var, moments.unbiased_variance()),
            ):
                moved = running.double() * (1 - share) + batch * share
                running.copy_(torch.where(seen, moved, running.double()))

    def _gated(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return dy as it is before the ReLU: a function of dy alone, since steps have no slope."""
        with torch.no_grad():
            closed = self.normalize(x, norm._replace(relu=False)) <= 0  # so that NaN passes
        return dy.masked_fill(closed, 0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _batch_axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Return a (C,) vector in x's compute dtype, shaped to broadcast along x's channels."""
    return vector.to(_compute_dtype(x)).reshape(1, -1, *[1] * (x.dim() - 2))


def _center(x: Tensor, mean: Tensor) -> _Centered:
    """Return x − head as a fresh tensor, with head = mean in the compute dtype, and rest."""
    head = mean.detach().to(_compute_dtype(x))  # the rest carries the mean's gradient
    return _Centered(x - _per_channel(head, x), mean - head.double())


def _affine(values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return values·scale + offset; writes into the values, which nobody else has, if it may."""
    if torch.compiler.is_compiling() or transforming() or not has_memory(scale):
        return values * scale + offset  # under vmap, the values may lack the scale's members
    return values.mul_(scale).add_(offset)
