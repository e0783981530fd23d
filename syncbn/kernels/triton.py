"""The kernels in Triton, for tensors on a GPU; `triton_source.py` has the loops."""

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn._native.plain import are_plain, has_memory, is_unobserved
from syncbn.kernels import triton_launch as launch
from syncbn.kernels import triton_ops as ops
from syncbn.kernels.native import is_channels_last
from syncbn.kernels.protocol import Kernels, Masking, Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.mark import Mark, Marks
from syncbn.moments import Moments, move_shift

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


class TritonKernels(Kernels):
    """Batch normalization's kernels, one pass over memory each; see `Kernels` in `protocol.py`.

    float32, bfloat16 and float16 on a GPU, contiguous or channels last. Anything else is left to
    the reference. Sums over a batch are made in float32 lanes that carry their rounding errors
    along, and finished in float64; results are the same from run to run. With TRITON_INTERPRET=1 in
    the environment, Triton interprets the kernels, slowly, on the CPU.

    Error: σ² to about 1e-8 of itself, however far the mean lies from 0, as long as (x − mean)² fits
    float32; the variance of a tensor with larger deviations is infinite or NaN. So is a sum over
    infinite gradients.
    """

    # The interpreter cuts bfloat16 off instead of rounding.
    parameter_dtypes = (
        (torch.float32, torch.float16)
        if launch.INTERPRETED
        else (torch.float32, torch.bfloat16, torch.float16)
    )
    masks = True

    def can_compute(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether they compute with these tensors themselves, and not by the reference."""
        return can_take(x, *others)

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x, shape (N, C, *)."""
        if not can_take(x):
            return _REFERENCE.local_moments(x)
        if not is_unobserved():
            return Moments(ops.moments(x, None, False))
        return Moments(launch.moments(x, None, False))

    def row(self, x: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Tensor:
        """Return x's moments and a stamp made of the shift; see `syncbn.moments.to_row`."""
        if not can_take(x, shift):
            return super().row(x, shift, mark)
        if not is_unobserved():
            return ops.moments(x, shift, True)
        return launch.moments(x, shift, True, mark)

    def merge(self, rows: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Moments:
        """Return the moments of all ranks' batches; see `syncbn.moments.from_rows`."""
        if not are_here(rows, shift):
            return super().merge(rows, shift, mark)
        if is_unobserved():
            move = shift is not None
            return Moments(launch.merge(rows, shift, check=True, move=move, mark=mark))
        moments = Moments(ops.merge(rows))
        if shift is not None:
            move_shift(shift, moments.count, moments.mean)
        return moments

    def normalization(
        self,
        moments: Moments,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        eps: float,
    ) -> Normalization:
        """Return what normalizes a batch; see `syncbn.moments.statistics_of`."""
        if not (is_unobserved() and are_here(moments.packed, weight, bias)):
            return super().normalization(moments, weight, bias, relu, eps)
        return launch.normalization(moments.packed.contiguous(), weight, bias, relu, eps)

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """Return (x − mean)·invstd·weight + bias + residual, or max(·, 0), in x's dtype, format."""
        if not can_take(x, *norm[:3], residual):
            return _REFERENCE.normalize(x, norm, residual)
        if not is_unobserved():
            return ops.normalize(x, *norm[:4], residual)
        return launch.normalize(x, norm, residual)

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return Σdy and Σdy·x̂ over this replica, shape (2C,), float64."""
        if not can_take(x, dy, *norm[:3]):
            return _REFERENCE.backward_reduce(dy, x, norm)
        if not is_unobserved():
            return ops.backward_reduce(dy, x, *norm[:4])
        return launch.backward_reduce(dy, x, norm)

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """Return dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), in x's dtype and format."""
        if not can_take(x, dy, *norm[:3], sums):
            return _REFERENCE.backward_input(dy, x, norm, sums)
        if not is_unobserved():
            return ops.backward_input(dy, x, *norm[:4], sums)
        return launch.backward_input(dy, x, norm, sums)

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        norm: Normalization,
        dweight: Tensor | None,
        dbias: Tensor | None,
        add_up: Callable[[Tensor], Tensor] | None,
        marks: Marks | None = None,
        masking: Masking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Kernels`."""
        if not (can_take(x, dy, *norm[:3], *(masking or ())) and is_unobserved()):
            return super().gradients(dy, x, norm, dweight, dbias, add_up, marks, masking)
        before, after = (None, None) if marks is None else marks
        sums = launch.backward_reduce(dy, x, norm, dweight, dbias, before, masking)
        if add_up is None:
            return sums, None
        dy = dy if masking is None else masking.masked
        return sums, launch.backward_input(dy, x, norm, add_up(sums), after)

    def update_running(
        self,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        momentum: float | None,
    ) -> None:
        """Move running statistics, in place, towards the moments of a batch."""
        buffers = running_mean, running_var, num_batches_tracked
        c = moments.packed.shape[0] // 2
        if not (
            is_unobserved()
            and are_here(moments.packed, *buffers)
            and running_mean.shape == running_var.shape == (c,)
            and num_batches_tracked.dim() == 0
            and all(buffer.is_contiguous() for buffer in buffers)
            and not (
                launch.INTERPRETED and torch.bfloat16 in (running_mean.dtype, running_var.dtype)
            )
        ):
            _REFERENCE.update_running(moments, *buffers, momentum)
            return
        launch.update_running(moments.packed.contiguous(), buffers, momentum)
        torch.autograd.graph.increment_version(buffers)


_REFERENCE = ReferenceKernels()


def can_take(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels can compute with these tensors."""
    return (
        are_here(x, *others)
        and x.dtype in DTYPES
        and x.numel() > 0
        and (x.is_contiguous() or is_channels_last(x))
    )


def are_here(*tensors: Tensor | None) -> bool:
    """Return whether these are tensors in the memory of one device that the kernels run on."""
    if torch.compiler.is_compiling():  # they stand for plain ones then
        return not launch.INTERPRETED and all(
            tensor is None or tensor.is_cuda for tensor in tensors
        )
    if launch.INTERPRETED:
        return are_plain(*tensors)
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        if not (type(tensor) in _PLAIN and tensor.is_cuda and has_memory(tensor)):
            return False
        device = device or tensor.device
        if tensor.device != device:
            return False
    return True
