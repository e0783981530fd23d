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
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return (x − mean)·invstd·weight + bias; a missing weight is 1, a missing bias 0."""
        ...

    def backward_reduce(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Σdy and Σdy·x̂ over this replica, with x̂ = (x − mean)·invstd."""
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
    ) -> Tensor:
        """Return dx = weight·invstd·(dy − mean_dy − x̂·mean_dy_xhat)."""
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
