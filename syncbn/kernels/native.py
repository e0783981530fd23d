"""The kernels in C++, for tensors on the CPU; `syncbn/_native/` has the loops."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from syncbn import _native
from syncbn._native.plain import are_plain, is_unobserved
from syncbn.kernels.protocol import Kernels, Masking, Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.mark import Marks
from syncbn.moments import Moments

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_CPU = torch.device("cpu")


class NativeKernels(Kernels):
    """Batch normalization's kernels, one pass over memory each; see `Kernels` in `protocol.py`.

    float32, bfloat16 and float16 on the CPU, contiguous or channels last. Anything else (float64,
    other strides and devices, tensors inside function transforms) is left to the reference. Sums
    are accumulated in float64 from the first value on, the elementwise part is computed in float32.
    Uses as many threads as torch does; the results do not depend on their number.
    """

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x, shape (N, C, *), as a rule in one pass.

        Sums x − c and (x − c)², with c the channel's first value; if that lies more than 30 σ from
        the mean, which would cost digits, once more about the mean.
        """
        if not can_read(x):
            return _REFERENCE.local_moments(x)
        if is_unobserved():
            return PLAIN.local_moments(x)
        return Moments(torch.ops.syncbn.local_moments(x))

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """Return (x − mean)·invstd·weight + bias + residual, or max(·, 0), in x's dtype, format."""
        if not can_read(x, *norm[:3], residual):
            return _REFERENCE.normalize(x, norm, residual)
        if is_unobserved():
            return PLAIN.normalize(x, norm, residual)
        return torch.ops.syncbn.normalize(x, *norm[:4], residual)

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return Σdy and Σdy·x̂ over this replica, shape (2C,), float64."""
        if not can_read(x, dy, *norm[:3]):
            return _REFERENCE.backward_reduce(dy, x, norm)
        if is_unobserved():
            return PLAIN.backward_reduce(dy, x, norm)
        return torch.ops.syncbn.backward_reduce(dy, x, *norm[:4])

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """Return dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), in x's dtype and format."""
        if not can_read(x, dy, *norm[:3], sums):
            return _REFERENCE.backward_input(dy, x, norm, sums)
        if is_unobserved():
            return PLAIN.backward_input(dy, x, norm, sums)
        return torch.ops.syncbn.backward_input(dy, x, *norm[:4], sums)

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
        channels = moments.packed.shape[0] // 2
        if not (
            is_unobserved()
            and are_plain(moments.packed, *buffers)
            and (momentum is None or momentum >= 0)
            and running_mean.shape == running_var.shape == (channels,)
            and num_batches_tracked.dim() == 0
            and running_mean.dtype is running_var.dtype is torch.float32
            and num_batches_tracked.dtype is torch.int64
            and running_mean.is_contiguous()
            and running_var.is_contiguous()
        ):
            _REFERENCE.update_running(moments, *buffers, momentum)
            return
        _library().syncbn_update_running(
            moments.packed.data_ptr(),
            channels,
            -1.0 if momentum is None else momentum,
            running_mean.data_ptr(),
            running_var.data_ptr(),
            num_batches_tracked.data_ptr(),
        )
        torch.autograd.graph.increment_version(buffers)


class PlainKernels(NativeKernels):
    """The native kernels for tensors that `can_read` has looked at, while torch observes nothing.

    Small inputs cost mostly what is done in Python, so that looking once for all kernels pays.
    """

    parameter_dtypes = (torch.float32,)

    def local_moments(self, x: Tensor) -> Moments:
        """See `NativeKernels`."""
        packed = _vector(2 * x.shape[1] + 1)
        _library().syncbn_local_moments(_layout(x), x.data_ptr(), packed.data_ptr())
        return Moments(packed)

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """See `NativeKernels`."""
        y, by = torch.empty_like(x), _pointers(norm)
        residual = None if residual is None else laid_out_as(x, residual)
        added = None if residual is None else residual.data_ptr()
        _library().syncbn_normalize(_layout(x), x.data_ptr(), added, by, y.data_ptr())
        return y

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """See `NativeKernels`."""
        return self.gradients(dy, x, norm, None, None, None)[0]

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """See `NativeKernels`."""
        if sums.dtype is not torch.float64 or not sums.is_contiguous():
            sums = sums.double().contiguous()
        return _input_gradient(laid_out_as(x, dy), x, _layout(x), _pointers(norm), sums)

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
        """See `Kernels`; on the CPU, nobody looks for marks."""
        assert masking is None  # as they do not mask
        dy, sums = laid_out_as(x, dy), _vector(2 * x.shape[1])
        layout, by = _layout(x), _pointers(norm)
        _library().syncbn_backward_reduce(
            layout,
            dy.data_ptr(),
            x.data_ptr(),
            by,
            sums.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
            None if dbias is None else dbias.data_ptr(),
        )
        if add_up is None:
            return sums, None
        return sums, _input_gradient(dy, x, layout, by, add_up(sums))


def _input_gradient(
    dy: Tensor, x: Tensor, layout: _native.Layout, by: _native.Normalization, sums: Tensor
) -> Tensor:
    dx = torch.empty_like(x)
    _library().syncbn_backward_input(
        layout, dy.data_ptr(), x.data_ptr(), by, sums.data_ptr(), dx.data_ptr()
    )
    return dx


_REFERENCE = ReferenceKernels()
PLAIN = PlainKernels()


def can_read(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the library can read all of these tensors' memory, now or once compiled."""
    if torch.compiler.is_compiling():  # the tensors stand for plain ones then
        if not (x.is_cpu and all(tensor is None or tensor.is_cpu for tensor in others)):
            return False
    elif not are_plain(x, *others):
        return False
    return x.dtype in DTYPES and (x.is_contiguous() or is_channels_last(x))


def _library() -> ctypes.CDLL:
    assert _native.library is not None  # or nobody would have chosen these kernels
    return _native.library


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a tensor of four or five dimensions lie side by side."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    return channels_last is not None and x.is_contiguous(memory_format=channels_last)


def _layout(x: Tensor) -> _native.Layout:
    """Return how a tensor lies in memory, and how many threads to use."""
    return _layout_of(x.shape, x.dtype, x.is_contiguous(), torch.get_num_threads())


@lru_cache(maxsize=4096)
def _layout_of(
    shape: torch.Size, dtype: torch.dtype, contiguous: bool, threads: int
) -> _native.Layout:
    n, c = shape[0], shape[1]
    s = shape.numel() // (n * c) if n * c > 0 else 1
    # Without spatial axes, or with one position, the two layouts are the same memory.
    return _native.Layout(n, c, s, DTYPES[dtype], s == 1 or not contiguous, threads)


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """Return another tensor of x's shape in x's dtype and memory format."""
    if other.dtype is x.dtype and other.stride() == x.stride():
        return other
    other = other.to(x.dtype)
    if x.is_contiguous():
        return other.contiguous()
    return other.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def _vector(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=_CPU)


def _pointers(norm: Normalization) -> _native.Normalization:
    """Return a normalization as the library reads it, while the normalization is alive."""
    statistics, weight, bias, relu, _ = norm
    readable = statistics.is_contiguous()
    for tensor in (weight, bias):
        if tensor is not None and not (tensor.dtype is torch.float32 and tensor.is_contiguous()):
            readable = False
    if not readable:
        statistics = statistics.contiguous()
        weight, bias = (None if t is None else t.double().contiguous() for t in (weight, bias))
    pointers = _native.Normalization(
        statistics.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        not readable,
        relu,
    )
    if not readable:
        pointers.owners = statistics, weight, bias  # which nothing else keeps alive
    return pointers


# What torch.compile puts into its graphs. It may hand over other strides than it traced with, so
# each of them goes through the method again, which looks. The fakes tell what comes out: a vector,
# or a tensor like x.
@torch.library.custom_op("syncbn::local_moments", mutates_args=())
def _local_moments(x: Tensor) -> Tensor:
    return NativeKernels().local_moments(x).packed


@torch.library.custom_op("syncbn::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    return NativeKernels().normalize(x, Normalization(statistics, weight, bias, relu), residual)


@torch.library.custom_op("syncbn::backward_reduce", mutates_args=())
def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    norm = Normalization(statistics, weight, bias, relu)
    return NativeKernels().backward_reduce(dy, x, norm)


@torch.library.custom_op("syncbn::backward_input", mutates_args=())
def _backward_input(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    sums: Tensor,
) -> Tensor:
    norm = Normalization(statistics, weight, bias, relu)
    return NativeKernels().backward_input(dy, x, norm, sums)


def _fake_vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64)


def _like_x(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_local_moments.register_fake(lambda x: _fake_vector(x, 2 * x.shape[1] + 1))
_normalize.register_fake(_like_x)
_backward_reduce.register_fake(lambda dy, x, *_: _fake_vector(x, 2 * x.shape[1]))
_backward_input.register_fake(lambda dy, x, *_: torch.empty_like(x))
