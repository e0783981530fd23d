"""The kernels in PyTorch operations: readable, on any device, the yardstick for the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import Moments


class _Centered(NamedTuple):
    """x − head, and what is left of the mean: x − mean = values − rest."""

    values: Tensor
    rest: Tensor


class ReferenceKernels:
    """Batch normalization's kernels as PyTorch operations; see `Kernels` in `protocol.py`.

    float16 and bfloat16 are computed in float32, float32 and float64 in their own precision; every
    sum over a batch is accumulated in float64. The mean is subtracted in two parts, head and rest,
    because rounding it to float32 alone costs |mean|/σ · 2⁻²⁴ of every normalised value.
    """

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
        return Moments(total, near.double() + error, m2)

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Return (x − mean)·invstd·weight + bias + residual, or max(·, 0), in x's dtype, format."""
        values, rest = _center(x, mean)
        scale = invstd if weight is None else invstd * weight
        offset = -rest * scale if bias is None else bias - rest * scale
        y = values.mul_(_per_channel(scale, x)).add_(_per_channel(offset, x))
        if residual is not None:
            y = y.add_(residual)
        if relu:
            y = y.relu_()
        return y.to(x.dtype)

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return Σdy and Σdy·x̂ over this replica, each (C,), float64."""
        axes = _batch_axes(x)
        if relu:
            dy = self._gated(dy, x, mean, invstd, weight, bias)
        values, rest = _center(x, mean)
        sum_dy = dy.sum(axes, dtype=torch.float64)
        sum_dy_centered = values.mul_(dy).sum(axes, dtype=torch.float64) - rest * sum_dy
        return sum_dy, sum_dy_centered * invstd

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        mean_dy: Tensor,
        mean_dy_xhat: Tensor,
        bias: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Return dx = weight·invstd·(dy − mean_dy − x̂·mean_dy_xhat), in x's dtype and format."""
        if relu:
            dy = self._gated(dy, x, mean, invstd, weight, bias)
        values, rest = _center(x, mean)
        scale = invstd if weight is None else invstd * weight
        slope = invstd * mean_dy_xhat  # x̂·mean_dy_xhat = (values − rest)·slope
        offset = scale * (rest * slope - mean_dy)
        values.mul_(_per_channel(-scale * slope, x)).add_(_per_channel(offset, x))
        return values.addcmul_(dy.to(values.dtype), _per_channel(scale, x)).to(x.dtype)

    def _gated(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Return dy as it is before the ReLU: a function of dy alone, since steps have no slope."""
        with torch.no_grad():
            closed = self.normalize(x, mean, invstd, weight, bias) <= 0  # so that NaN passes
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
