"""The kernels in C++, for tensors on the CPU; `syncbn/_native/` has the loops."""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncbn import _native
from syncbn.errors import InputError
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments, PackedMoments

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (Tensor, nn.Parameter)
# How many TorchDispatchModes are active, whether torch.func transforms something, and whether a
# tensor has memory of its own, which one inside a transform has not. Nothing public tells.
_listeners: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_has_memory: Callable[[Tensor], bool] = torch._C._has_storage  # pyright: ignore[reportPrivateUsage]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class NativeKernels:
    """Batch normalization's kernels, one pass over memory each; see `Kernels` in `protocol.py`.

    float32, bfloat16 and float16 on the CPU, contiguous or channels last. Anything else (float64,
    other strides and devices, tensors inside function transforms) is left to the reference. Sums
    are accumulated in float64 from the first value on, the elementwise part is computed in float32.
    Uses as many threads as torch does; the results do not depend on their number.

    Raises:
        InputError: the library was not compiled when syncbn was installed.
    """

    def __init__(self) -> None:
        if _native.library is None:
            raise InputError(
                "the native kernels are not there; install g++ or clang++ and then syncbn again, "
                "or set SYNCBN_KERNELS to auto or reference"
            )

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x, shape (N, C, *), as a rule in one pass.

        Sums x − c and (x − c)², with c the channel's first value; where that lies more than 30 σ
        from the mean, which would cost digits, once more about the mean.
        """
        if not _handles(x):
            return ReferenceKernels().local_moments(x)
        count = x.numel() // x.shape[1]
        total = torch.full((), float(count), dtype=torch.float64, device=x.device)
        if _dispatched():
            return Moments(total, *torch.ops.syncbn.local_moments(x))
        mean, m2 = _vector(x), _vector(x)
        _library().syncbn_local_moments(*source(x), mean.data_ptr(), m2.data_ptr())
        return Moments(total, mean, m2)

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
        inputs = x, mean, invstd, weight, bias, residual
        if not _handles(*inputs):
            return ReferenceKernels().normalize(*inputs, relu)
        if _dispatched():
            return torch.ops.syncbn.normalize(*inputs, relu)
        y = torch.empty_like(x)
        residual = None if residual is None else laid_out_as(x, residual)
        statistics, parameters = _Statistics.of(mean, invstd), Parameters.of(weight, bias)
        _library().syncbn_normalize(
            *(DTYPES[x.dtype], x.data_ptr(), None if residual is None else residual.data_ptr()),
            *(y.data_ptr(), *layout(x), torch.get_num_threads()),
            *(*statistics.pointers(), *parameters.pointers(), relu),
        )
        return y

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
        inputs = dy, x, mean, invstd, weight, bias
        if not _handles(x, dy, mean, invstd, weight, bias):
            return ReferenceKernels().backward_reduce(*inputs, relu)
        if _dispatched():
            return torch.ops.syncbn.backward_reduce(*inputs, relu)
        dy = laid_out_as(x, dy)
        sum_dy, sum_dy_xhat = _vector(x), _vector(x)
        statistics, parameters = _Statistics.of(mean, invstd), Parameters.of(weight, bias)
        _library().syncbn_backward_reduce(
            *(DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), *layout(x), torch.get_num_threads()),
            *(*statistics.pointers(), *parameters.pointers(), relu),
            *(sum_dy.data_ptr(), sum_dy_xhat.data_ptr(), None, None),
        )
        return sum_dy, sum_dy_xhat

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
        inputs = dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat, bias
        if not _handles(x, dy, mean, invstd, weight, mean_dy, mean_dy_xhat, bias):
            return ReferenceKernels().backward_input(*inputs, relu)
        if _dispatched():
            return torch.ops.syncbn.backward_input(*inputs, relu)
        dy, dx = laid_out_as(x, dy), torch.empty_like(x)
        statistics, parameters = _Statistics.of(mean, invstd), Parameters.of(weight, bias)
        means = _Statistics.of(mean_dy, mean_dy_xhat)
        _library().syncbn_backward_input(
            *(DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), dx.data_ptr(), *layout(x)),
            *(torch.get_num_threads(), *statistics.pointers(), *parameters.pointers(), relu),
            *(*means.pointers(), 1.0),
        )
        return dx


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether these are tensors in this machine's memory, with torch listening to nothing.

    The library can then be called without torch: x in a layout and dtype that it reads, no
    tracing, no function transform, no TorchDispatchMode.
    """
    if torch.compiler.is_compiling() or _listeners() or _transforming():
        return False
    for tensor in (x, *others):
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and _has_memory(tensor)
        ):
            return False
    return x.dtype in DTYPES and (x.is_contiguous() or _is_channels_last(x))


def track(
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float | None,
) -> bool:
    """Move running statistics towards a batch's moments, in place, if the library can.

    running = (1 − momentum)·running + momentum·batch, with the unbiased variance; momentum None
    means the plain average over all batches. A batch without samples changes nothing.

    Returns:
        Whether it was done: for moments that are packed, statistics in float32, and plain tensors.
    """
    buffers = running_mean, running_var, num_batches_tracked
    if not (
        isinstance(moments, PackedMoments)
        and is_plain(*buffers)
        and running_mean.dtype is running_var.dtype is torch.float32
        and num_batches_tracked.dtype is torch.int64
        and running_var.is_contiguous()
    ):
        return False
    _library().syncbn_track(
        *(moments.vector.data_ptr(), running_mean.numel(), -1.0 if momentum is None else momentum),
        *(buffer.data_ptr() for buffer in buffers),
    )
    torch.autograd.graph.increment_version(buffers)
    return True


def _library() -> ctypes.CDLL:
    assert _native.library is not None  # or there would be no NativeKernels
    return _native.library


def _handles(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the library can read all of these tensors' memory, now or once compiled."""
    if x.dtype not in DTYPES or not (x.is_contiguous() or _is_channels_last(x)):
        return False
    compiling = torch.compiler.is_compiling()  # the tensors stand for plain ones then
    for tensor in (x, *others):
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return False
        if not compiling and not (type(tensor) in _PLAIN and _has_memory(tensor)):
            return False
    return True


def _dispatched() -> bool:
    """Return whether torch must see the call: it is tracing, or something listens to operations."""
    return torch.compiler.is_compiling() or _listeners() > 0


def _is_channels_last(x: Tensor) -> bool:
    channels_last = _CHANNELS_LAST.get(x.dim())
    return channels_last is not None and x.is_contiguous(memory_format=channels_last)


def layout(x: Tensor) -> tuple[int, int, int, bool]:
    """Return n, c, s and whether channels are last; without spatial axes, they are."""
    n, c = x.shape[0], x.shape[1]
    s = x.numel() // (n * c) if n * c > 0 else 1
    return n, c, s, s == 1 or not x.is_contiguous()


def source(x: Tensor) -> tuple[int, int, int, int, int, bool, int]:
    """Return what the library wants to know of a tensor to read, and how many threads to use."""
    return DTYPES[x.dtype], x.data_ptr(), *layout(x), torch.get_num_threads()


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """Return another tensor of x's shape in x's dtype and memory format."""
    other = other.to(x.dtype)
    if x.is_contiguous():
        return other.contiguous()
    return other.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def _vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64)


class _Statistics(NamedTuple):
    """Two vectors as the library reads them: float64, contiguous. They keep their memory alive."""

    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "_Statistics":
        return cls(first.double().contiguous(), second.double().contiguous())

    def pointers(self) -> tuple[int, int]:
        return self.first.data_ptr(), self.second.data_ptr()


class Parameters(NamedTuple):
    """γ and β as the library reads them: both float32, or both float64."""

    weight: Tensor | None
    bias: Tensor | None
    in_float64: bool

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None) -> "Parameters":
        """Return them as they are, or converted."""
        for tensor in (weight, bias):
            if tensor is not None and not (
                tensor.dtype is torch.float32 and tensor.is_contiguous()
            ):
                weight, bias = (
                    None if t is None else t.double().contiguous() for t in (weight, bias)
                )
                return cls(weight, bias, True)
        return cls(weight, bias, False)

    def pointers(self) -> tuple[int | None, int | None, bool]:
        """Return what the library's functions take."""
        weight, bias = self.weight, self.bias
        return (
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.in_float64,
        )


# What torch.compile puts into its graphs. It may hand over other strides than it traced with, so
# each of them goes through the method again, which looks. The fakes tell what comes out: two
# vectors, or a tensor like x.
@torch.library.custom_op("syncbn::local_moments", mutates_args=())
def _local_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    moments = NativeKernels().local_moments(x)
    return moments.mean, moments.m2


@torch.library.custom_op("syncbn::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    return NativeKernels().normalize(x, mean, invstd, weight, bias, residual, relu)


@torch.library.custom_op("syncbn::backward_reduce", mutates_args=())
def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return NativeKernels().backward_reduce(dy, x, mean, invstd, weight, bias, relu)


@torch.library.custom_op("syncbn::backward_input", mutates_args=())
def _backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    means = mean_dy, mean_dy_xhat
    return NativeKernels().backward_input(dy, x, mean, invstd, weight, *means, bias, relu)


_local_moments.register_fake(lambda x: (_vector(x), _vector(x)))
_normalize.register_fake(lambda x, *_: torch.empty_like(x))
_backward_reduce.register_fake(lambda dy, x, *_: (_vector(x), _vector(x)))
_backward_input.register_fake(lambda dy, x, *_: torch.empty_like(x))
