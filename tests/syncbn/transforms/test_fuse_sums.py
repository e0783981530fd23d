"""Sums that `fuse` gives to a normalization: of any shapes and dtypes, and of tensors in use."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from tests.support.step import assert_same_step
from tests.support.world import run_world

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


@pytest.mark.parametrize("other", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("in_place", [True, False])
def test_sum_has_the_memory_format_of_before(in_place: bool, other: torch.memory_format) -> None:
    model = _Sum(in_place).double()
    fused = syncbn.fuse(model).model
    x, residual = torch.randn(2, 3, C, 5, 6).double()
    residual = residual.contiguous(memory_format=other)
    assert fused(x, residual).stride() == model(x, residual).stride()
    assert_same_step(fused, model, x, residual)


class _AddsMean(nn.Module):
    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.bn, self.expanded = syncbn.SyncBatchNorm(C), expanded

    def forward(self, x: Tensor) -> Tensor:
        mean = self.bn.running_mean.view(1, -1)  # pyright: ignore[reportOptionalMemberAccess] -- it tracks
        if self.expanded:
            mean = mean.expand_as(x)
        return self.bn(x) + mean


def _sum_with_the_running_mean() -> list[Tensor]:
    x = torch.randn(2, C, generator=torch.Generator().manual_seed(0))[dist.get_rank()].view(1, C)
    model = _AddsMean(expanded=False)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "add"}
    return [fusion.model(x), model(x)]


def test_view_of_the_running_mean_is_added_after_the_layer_has_moved_it() -> None:
    for ours, truth in run_world(2, _sum_with_the_running_mean):
        torch.testing.assert_close(ours, truth)
    model = _AddsMean(expanded=True)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "add"}
    x = torch.randn(6, 1).expand(6, C)
    torch.testing.assert_close(fusion.model(x), model(x))
