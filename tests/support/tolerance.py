"""Tolerances that come from the rounding error of a plain computation in the same precision."""

import torch
from torch import Tensor

# y and dx are made with at most eight roundings, of half a unit in the last place each.
_UNITS = 4


def assert_as_exact(
    ours: Tensor, truth: Tensor, plain: Tensor, what: str, terms: float | None = None
) -> None:
    """Assert that ours is as near to the truth as plain PyTorch is, up to a factor of 2.

    Where plain PyTorch happens to be exact, four units in the last place remain.

    Args:
        ours: what is tested, in its own precision.
        truth: the float64 result.
        plain: the result of PyTorch's own computation in the precision of ours.
        what: names the tensor in the error.
        terms: the largest magnitude among what is added up, where that may cancel; None: that of
            the truth.
    """
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, expected {truth.shape}"
    if ours.numel() == 0:
        return
    error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    unit = torch.finfo(ours.dtype).eps * (terms or truth.abs().max().item())
    bound = 2 * plain_error + _UNITS * unit
    assert error <= bound, f"{what}: error {error:.3g}, plain {plain_error:.3g}, unit {unit:.3g}"
