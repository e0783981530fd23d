"""Sums that `fuse` gives to a normalization: of any shapes and dtypes, and of tensors in use."""

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.support.step import assert_same_step

C = 4


class _Sum(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.bn, self.in_place = syncbn.SyncBatchNorm(C), in_place

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn(x)
        if self.in_place:
            y += residual
        else:
            y = residual + y
        return y.relu()


@pytest.mark.parametrize(
    "shape",
    [pytest.param((1, C, 1, 1), id="smaller"), pytest.param((2, 3, C, 4, 4), id="larger")],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_residual_of_another_shape_is_added_as_before(
    shape: tuple[int, ...], in_place: bool
) -> None:
    model = _Sum(in_place).double()
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "add, relu"}
    x, residual = torch.randn(3, C, 4, 4).double(), torch.randn(shape).double()
    if in_place and len(shape) == 5:
        with pytest.raises(RuntimeError, match="broadcast shape"):
            fusion.model(x, residual)
    else:
        assert_same_step(fusion.model, model, x, residual)


def test_residual_of_another_dtype_is_added_as_before() -> None:
    x, residual = torch.randn(3, C, 4).float(), torch.randn(3, C, 4).double()
    for in_place, dtype in ((True, torch.float32), (False, torch.float64)):
        assert syncbn.fuse(_Sum(in_place)).model(x, residual).dtype == dtype


def test_tensors_changed_after_the_addition_have_their_gradients() -> None:
    class Later(_Sum):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            z = residual * 1.0
            y = self.bn(x) + z
            z *= 2
            y *= 3
            return y * z

    model = Later(False).double()
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "add"}
    x = torch.randn(3, C, 4).double()
    assert_same_step(fusion.model, model, x, x.flip(0))


def test_augmented_assignment_changes_what_else_refers_to_the_tensor() -> None:
    class Aliased(_Sum):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            count = size = x.size(0)
            count += 1
            kept = x = x * 1.0
            x += residual
            return self.bn(x * count).relu() + kept * size

    model = Aliased(False).double()
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "relu"}
    x = torch.randn(3, C, 4).double()
    assert_same_step(fusion.model, model, x, x.flip(0))
