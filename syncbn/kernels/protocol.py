"""What a set of kernels computes, and the value that normalizes; every set passes one test suite.

The suite is `tests/contracts/test_kernels.py`.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from syncbn.moments import Moments


class Normalization(NamedTuple):
    """y = (x − mean)·invstd·weight + bias, and max(y, 0) with relu.

    Attributes:
        statistics: count of the whole batch, means and invstd = 1/√(σ² + eps), shape (2C + 1,),
            float64; see `syncbn.moments.statistics_of`.
        weight: γ, shape (C,); None for 1.
        bias: β, shape (C,); None for 0.
        relu: whether a ReLU comes last.
    """

    statistics: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False

    @property
    def total(self) -> Tensor:
        """Values per channel of the whole batch, 0-d: a view."""
        return self.statistics[0]

    @property
    def mean(self) -> Tensor:
        """Means of the whole batch, shape (C,): a view."""
        return self.statistics[1 : (self.statistics.shape[0] + 1) // 2]

    @property
    def invstd(self) -> Tensor:
        """1/√(σ² + eps) of the whole batch, shape (C,): a view."""
        return self.statistics[(self.statistics.shape[0] + 1) // 2 :]


class Kernels(Protocol):
    """What a set of kernels computes on one replica; x and dy are (N, C, *), floating point.

    Statistics and sums are float64; tensors of x's shape leave in x's dtype and memory format,
    computed in at least float32. Kernels never communicate.
    """

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x."""
        ...

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """Return (x − mean)·invstd·weight + bias, plus the residual, and max(·, 0) with relu.

        The residual has x's shape and dtype.
        """
        ...

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return Σdy and Σdy·x̂ over this replica, shape (2C,), with x̂ = (x − mean)·invstd.

        With relu, of those dy alone whose y, without a residual, is more than 0; y is computed
        again and need not be stored.
        """
        ...

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """Return dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), a count of 0 being 1.

        With relu, dy counts where it does in `backward_reduce`, and is 0 elsewhere.

        Args:
            dy: gradient of y.
            x: the input.
            norm: what made y of x.
            sums: those of `backward_reduce` over all replicas, shape (2C,).
        """
        ...

    def update_running(
        self,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        momentum: float | None,
    ) -> None:
        """Move running statistics, in place, towards the moments of a batch.

        running = (1 − momentum)·running + momentum·batch, with the unbiased variance; a momentum
        of None means the plain average over all batches. A batch without samples changes nothing.
        """
        ...
