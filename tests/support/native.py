"""The native kernels as a machine with fewer instructions runs them."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

from syncbn import _native
from syncbn.kernels import NativeKernels
from syncbn.moments import Moments


@contextmanager
def limited(level: int) -> Generator[int]:
    """Use at most a level of instructions: 0 for any machine's, 1 for AVX2, 2 for AVX-512."""
    assert _native.library is not None
    try:
        yield _native.library.syncbn_limit_level(level)
    finally:
        _native.library.syncbn_limit_level(2)


class KernelsAtLevel(NativeKernels):
    """NativeKernels that use at most one level of instructions."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def local_moments(self, x: Tensor) -> Moments:
        with limited(self.level):
            return super().local_moments(x)

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        with limited(self.level):
            return super().normalize(x, mean, invstd, weight, bias)

    def backward_reduce(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        with limited(self.level):
            return super().backward_reduce(dy, x, mean, invstd)

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
        with limited(self.level):
            return super().backward_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat)
