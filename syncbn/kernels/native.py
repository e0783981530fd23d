"""The kernels in C++, for tensors on the CPU; `syncbn/_native/` has the loops."""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncbn import _native
from syncbn.errors import InputError
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (Tensor, nn.Parameter)
# Whether a tensor stands for another one inside torch.func's transforms; how many
# TorchDispatchModes are active. Nothing public tells.
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_listeners: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class NativeKernels:
    """Batch normalization's kernels, one pass over memory each; see `syncbn.kernels.Kernels`.

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
        _library().syncbn_local_moments(
            *(_DTYPES[x.dtype], x.data_ptr(), *_layout(x), torch.get_num_threads()),
            *(mean.data_ptr(), m2.data_ptr()),
        )
        return Moments(total, mean, m2)

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return (x − mean)·invstd·weight + bias in x's dtype and memory format."""
        if not _handles(x, mean, invstd, weight, bias):
            return ReferenceKernels().normalize(x, mean, invstd, weight, bias)
        if _dispatched():
            return torch.ops.syncbn.normalize(x, mean, invstd, weight, bias)
        y = torch.empty_like(x)
        statistics, parameters = _Statistics.of(mean, invstd), _Parameters.of(weight, bias)
        _library().syncbn_normalize(
            *(_DTYPES[x.dtype], x.data_ptr(), None, y.data_ptr(), *_layout(x)),
            *(torch.get_num_threads(), *statistics.pointers(), *parameters.pointers(), 0),
        )
        return y

    def backward_reduce(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Σdy and Σdy·x̂ over this replica, each (C,), float64."""
        if not _handles(x, dy, mean, invstd):
            return ReferenceKernels().backward_reduce(dy, x, mean, invstd)
        if _dispatched():
            return torch.ops.syncbn.backward_reduce(dy, x, mean, invstd)
        dy = _laid_out_as(x, dy)
        sum_dy, sum_dy_xhat = _vector(x), _vector(x)
        _library().syncbn_backward_reduce(
            *(_DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), *_layout(x), torch.get_num_threads()),
            *(*_Statistics.of(mean, invstd).pointers(), None, None, 0, 0),
            *(sum_dy.data_ptr(), sum_dy_xhat.data_ptr()),
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
    ) -> Tensor:
        """Return dx = weight·invstd·(dy − mean_dy − x̂·mean_dy_xhat), in x's dtype and format."""
        means = mean_dy, mean_dy_xhat
        if not _handles(x, dy, mean, invstd, weight, *means):
            return ReferenceKernels().backward_input(dy, x, mean, invstd, weight, *means)
        if _dispatched():
            return torch.ops.syncbn.backward_input(dy, x, mean, invstd, weight, *means)
        dy, dx = _laid_out_as(x, dy), torch.empty_like(x)
        statistics, parameters = _Statistics.of(mean, invstd), _Parameters.of(weight, None)
        gradients = _Statistics.of(*means)
        _library().syncbn_backward_input(
            *(_DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), dx.data_ptr(), *_layout(x)),
            *(torch.get_num_threads(), *statistics.pointers(), *parameters.pointers(), 0),
            *gradients.pointers(),
        )
        return dx


def _library() -> ctypes.CDLL:
    assert _native.library is not None  # or there would be no NativeKernels
    return _native.library


def _handles(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the library can read all of these tensors' memory."""
    if x.dtype not in _DTYPES or not (x.is_contiguous() or _is_channels_last(x)):
        return False
    compiling = torch.compiler.is_compiling()  # the tensors stand for plain ones then
    for tensor in (x, *others):
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return False
        if not compiling and (type(tensor) not in _PLAIN or _is_wrapped(tensor)):
            return False
    return True


def _dispatched() -> bool:
    """Return whether torch must see the call: it is tracing, or something listens to operations."""
    return torch.compiler.is_compiling() or _listeners() > 0


def _is_channels_last(x: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(x.dim())
    return layout is not None and x.is_contiguous(memory_format=layout)


def _layout(x: Tensor) -> tuple[int, int, int, bool]:
    """Return n, c, s and whether channels are last; without spatial axes, they are."""
    n, c = x.shape[0], x.shape[1]
    s = x.numel() // (n * c) if n * c > 0 else 1
    return n, c, s, s == 1 or not x.is_contiguous()


def _laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """Return dy in x's dtype and memory format."""
    dy = dy.to(x.dtype)
    if x.is_contiguous():
        return dy.contiguous()
    return dy.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


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


class _Parameters(NamedTuple):
    """γ and β as the library reads them: both float32, or both float64."""

    weight: Tensor | None
    bias: Tensor | None
    in_float64: bool

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None) -> "_Parameters":
        both = [tensor for tensor in (weight, bias) if tensor is not None]
        if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in both):
            return cls(weight, bias, False)
        weight, bias = (None if t is None else t.double().contiguous() for t in (weight, bias))
        return cls(weight, bias, True)

    def pointers(self) -> tuple[int | None, int | None, bool]:
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
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return NativeKernels().normalize(x, mean, invstd, weight, bias)


@torch.library.custom_op("syncbn::backward_reduce", mutates_args=())
def _backward_reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    return NativeKernels().backward_reduce(dy, x, mean, invstd)


@torch.library.custom_op("syncbn::backward_input", mutates_args=())
def _backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    return NativeKernels().backward_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat)


_local_moments.register_fake(lambda x: (_vector(x), _vector(x)))
_normalize.register_fake(lambda x, *_: torch.empty_like(x))
_backward_reduce.register_fake(lambda dy, x, *_: (_vector(x), _vector(x)))
_backward_input.register_fake(lambda dy, x, *_: torch.empty_like(x))
