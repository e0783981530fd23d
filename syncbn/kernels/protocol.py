"""The four per-replica computations of batch normalization, and the choice of who does them.

Kernels never communicate. Every set of kernels passes `tests/contracts/test_kernels.py`.
"""

import os
from typing import Protocol

from torch import Tensor

from syncbn import _native
from syncbn.errors import InputError
from syncbn.kernels.native import NativeKernels
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments


class Kernels(Protocol):
    """What a set of kernels computes on one replica; x and dy are (N, C, *), floating point.

    Statistics enter and leave as float64 vectors of shape (C,); tensors of x's shape leave in x's
    dtype and memory format, computed in at least float32.
    """

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x."""
        ...

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
        """Return (x − mean)·invstd·weight + bias, plus the residual, and of that max(·, 0).

        A missing weight is 1, a missing bias or residual 0; the maximum is taken with relu alone.
        The residual has x's shape and dtype.
        """
        ...

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
        """Return Σdy and Σdy·x̂ over this replica, with x̂ = (x − mean)·invstd.

        With relu, of those dy alone where normalize, with this weight and bias and without a
        residual, gives more than 0; it is computed again and need not be stored.
        """
        ...

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
        """Return dx = weight·invstd·(dy − mean_dy − x̂·mean_dy_xhat).

        With relu, dy counts where it does in `backward_reduce`, and is 0 elsewhere.
        """
        ...


VARIABLE = "SYNCBN_KERNELS"


def select_kernels() -> Kernels:
    """Return the kernels to use: the native ones, or the reference where they were not compiled.

    The environment variable SYNCBN_KERNELS decides otherwise: `native` insists on the native ones,
    `reference` takes PyTorch operations, `auto` is the rule.

    Raises:
        InputError: the variable has another value, or insists on kernels that are not there.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "native", "reference"):
        raise InputError(f"{VARIABLE} is {choice!r}; set it to auto, native or reference")
    if choice == "reference" or (choice == "auto" and _native.library is None):
        return ReferenceKernels()
    return NativeKernels()


__all__ = ["Kernels", "NativeKernels", "ReferenceKernels", "select_kernels"]
