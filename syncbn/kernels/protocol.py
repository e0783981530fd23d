"""What a set of kernels computes, and the value that normalizes; every set passes one test suite.

The suite is `tests/contracts/test_kernels.py`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn.mark import Mark, Marks
from syncbn.moments import Moments, from_rows, statistics_of, to_row


class Normalization(NamedTuple):
    """y = (x − mean)·invstd·weight + bias, and max(y, 0) with relu.

    Attributes:
        statistics: count of the whole batch, means and invstd = 1/√(σ² + eps), shape (2C + 1,),
            float64; see `syncbn.moments.statistics_of`.
        weight: γ, shape (C,); None for 1.
        bias: β, shape (C,); None for 0.
        relu: whether a ReLU comes last.
        coefficients: of what is above, for the kernels that made it; None if they make none.
    """

    statistics: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False
    coefficients: Tensor | None = None

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


class Masking(NamedTuple):
    """By what a ReLU's gradient is masked in the same pass, after a residual was added.

    Attributes:
        output: of the ReLU; the gradient is 0 if it is not more than 0.
        masked: receives the gradient so masked, in its dtype; laid out as the input.
    """

    output: Tensor
    masked: Tensor


class Kernels(Protocol):
    """What a set of kernels computes on one replica; x and dy are (N, C, *), floating point.

    Statistics and sums are float64; tensors of x's shape leave in x's dtype and memory format,
    computed in at least float32. Kernels never communicate.

    Attributes:
        parameter_dtypes: of parameters whose gradients `gradients` writes without another pass.
        masks: whether `gradients` masks without another pass.
    """

    parameter_dtypes: tuple[torch.dtype, ...] = ()
    masks: bool = False

    def can_compute(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether they compute with these tensors themselves, and not by the reference."""
        return True

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x."""
        ...

    def row(self, x: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Tensor:
        """Return x's moments and a stamp made of the shift; see `syncbn.moments.to_row`.

        The mark is left once they are there.
        """
        row = to_row(self.local_moments(x), shift)
        if mark is not None:
            mark.leave(x.device)
        return row

    def merge(self, rows: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Moments:
        """Return the moments of all ranks' batches; see `syncbn.moments.from_rows`.

        The mark is left once the rows are there.
        """
        if mark is not None:
            mark.leave(rows.device)
        return from_rows(rows, shift)

    def normalization(
        self,
        moments: Moments,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        eps: float,
    ) -> Normalization:
        """Return what normalizes a batch; see `syncbn.moments.statistics_of`."""
        return Normalization(statistics_of(moments, eps), weight, bias, relu)

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
        """Do `backward_reduce`, add up over replicas, and do `backward_input`, if there is add_up.

        Args:
            dy: gradient of the output.
            x: the input.
            norm: normalized it.
            dweight: receives Σdy·x̂ of this replica, in its dtype; None for nothing to receive.
            dbias: receives Σdy, as well.
            add_up: returns the sum of all replicas' vectors; None if dx is not wanted.
            marks: left once this replica's sums are there, and once those of all are.
            masking: of dy; None for none.

        Returns:
            This replica's Σdy and Σdy·x̂, which add_up may have overwritten, and dx.
        """
        if masking is not None:
            mask = torch.ops.aten.threshold_backward.grad_input
            dy = mask(dy, masking.output, 0, grad_input=masking.masked)
        sums = self.backward_reduce(dy, x, norm)
        for gradient, half in zip((dbias, dweight), sums.chunk(2), strict=True):
            if gradient is not None:
                gradient.copy_(half)
        if add_up is None:
            return sums, None
        if marks is not None:
            marks.before.leave(x.device)
        totals = add_up(sums)
        if marks is not None:
            marks.after.leave(x.device)
        return sums, self.backward_input(dy, x, norm, totals)

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
