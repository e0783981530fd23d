"""What a fused model's own forward may read, and what happens if it is replaced afterwards."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.support.step import assert_same_step, fused_calls

X = torch.randn(3, 2, 4, 4, dtype=torch.float64)


class _Names(nn.Module):
    """Has a module and a parameter under two names each, and what a forward may do without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1), syncbn.SyncBatchNorm(2)
        self.twin, self.act = self.conv, nn.Tanh()
        self.scale = nn.Parameter(torch.full((), 2.0))
        self.factor, self.flag = self.scale, nn.Parameter(torch.ones(()))

    @property
    def slope(self) -> float:
        return 0.5

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale * self.slope

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaled(self.bn(self.conv(x)).relu()) + self.factor
        if self.flag is not None:  # pyright: ignore[reportUnnecessaryComparison] -- it may be replaced by None
            y = y * 1.5
        return self.twin(y)


def _filled(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((), value, dtype=torch.float64))


def _untie_module(model: nn.Module) -> None:
    model.twin = copy.deepcopy(model.twin)
    model.get_parameter("twin.weight").data.add_(1)


def _untie_first_module(model: nn.Module) -> None:
    model.conv = copy.deepcopy(model.conv)
    model.get_parameter("conv.weight").data.add_(1)


def _untie_parameter(model: nn.Module) -> None:
    model.factor = _filled(3.0)


def _drop_parameter(model: nn.Module) -> None:
    model.flag = None  # pyright: ignore[reportArgumentType] -- as modules without a bias have it


def _exchange_method(model: nn.Module) -> None:
    model.scaled = lambda x: x * 5.0  # pyright: ignore[reportArgumentType] -- as some libraries do


@pytest.mark.parametrize(
    "change",
    [_untie_module, _untie_first_module, _untie_parameter, _drop_parameter, _exchange_method],
)
def test_what_is_replaced_afterwards_is_used(change: Callable[[nn.Module], None]) -> None:
    model = _Names().double()
    fused = syncbn.fuse(model).model
    assert fused_calls(fused, X) == 1
    assert_same_step(fused, model, X)
    for each in (model, fused):
        change(each)
    assert fused_calls(fused, X) == 0
    assert_same_step(fused, model, X)


class _CallsForward(_Names):
    def forward(self, x: Tensor) -> Tensor:
        return self.act.forward(self.bn(self.conv(x)).relu())


def test_inner_forward_that_is_exchanged_afterwards_is_run() -> None:
    model = _CallsForward().double()
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "relu"}
    for each in (model, fusion.model):
        each.get_submodule("act").forward = lambda input: input * 5.0
    assert_same_step(fusion.model, model, X)


def test_class_whose_method_is_exchanged_afterwards_runs_the_new_one() -> None:
    model = _Names().double()
    fused = syncbn.fuse(model).model
    for name, value in (("scaled", lambda self, x: x * 5), ("slope", property(lambda self: 3.0))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Names, name, value)
            assert_same_step(fused, model, X)


class _Marked(_Names):
    @torch.jit.unused
    def scaled(self, x: Tensor) -> Tensor:
        return x * 3.0


def test_method_that_torch_has_marked_is_one_like_others() -> None:
    model = _Marked().double()
    fused = syncbn.fuse(model).model
    assert fused_calls(fused, X) == 1
    assert_same_step(fused, model, X)
