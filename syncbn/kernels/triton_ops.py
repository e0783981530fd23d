"""What torch.compile puts into its graphs: the Triton kernels as operators that it sees into."""

from torch import Tensor
from torch.library import triton_op

from syncbn.kernels import triton_launch as launch
from syncbn.kernels.protocol import Normalization

# torch gives its decorator no types.
# pyright: reportUntypedFunctionDecorator=false


@triton_op("syncbn::triton_moments", mutates_args=())
def moments(x: Tensor, shift: Tensor | None, stamp: bool) -> Tensor:
    """Return x's moments, and a stamp if there shall be one."""
    return launch.moments(x, shift, stamp)


@triton_op("syncbn::triton_merge", mutates_args=())
def merge(rows: Tensor) -> Tensor:
    """Return the moments of all ranks' batches, if their stamps agree."""
    return launch.merge(rows, None, check=True)


@triton_op("syncbn::triton_normalize", mutates_args=())
def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """Return y."""
    norm = Normalization(statistics, weight, bias, relu)
    return launch.normalize(x, norm, residual)


@triton_op("syncbn::triton_backward_reduce", mutates_args=())
def backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return Σdy and Σdy·x̂."""
    norm = Normalization(statistics, weight, bias, relu)
    return launch.backward_reduce(dy, x, norm)


@triton_op("syncbn::triton_backward_input", mutates_args=())
def backward_input(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    sums: Tensor,
) -> Tensor:
    """Return dx."""
    norm = Normalization(statistics, weight, bias, relu)
    return launch.backward_input(dy, x, norm, sums)
