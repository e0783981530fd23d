"""The penalty against float64 PyTorch, in one process, on the concatenated batch."""

from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn.baselines import StatisticsPenalty
from syncbn.errors import InputError
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()


def _share(sizes: tuple[int, ...], rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return rank + torch.randn(sizes[rank], 2, 3, 3, generator=generator).double()


def _units(model: nn.Sequential) -> dict[str, nn.Module]:
    return {"0": model[0], "3": model[3]}


def _on_a_rank(sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    model = _model()
    replica = DistributedDataParallel(model)
    penalty = StatisticsPenalty(_units(model), 0.3)
    with penalty.watch():
        output = replica(_share(sizes, dist.get_rank()))
    value = penalty.value()
    (output.sum() * 0 + value).backward()
    return value.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def _in_one_process(sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    model = _model()
    x = torch.cat([_share(sizes, rank) for rank in range(len(sizes))])
    first = model[0](x)
    second = model[3](model[2](model[1](first)))
    total = torch.zeros(()).double()
    for activations in (first.movedim(1, -1).reshape(-1, 3), second):
        mean, variance = activations.mean(0), activations.var(0, correction=0)
        total = total + 0.3 * (mean**2 + (variance - 1) ** 2).mean()
    total.backward()
    return total.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("sizes", [(5,), (4, 4), (1, 5, 3), (0, 6), (3, 0, 0)])
def test_value_and_gradient_are_those_of_the_global_batch(sizes: tuple[int, ...]) -> None:
    value, gradients = _in_one_process(sizes)
    for found, theirs in run_world(len(sizes), _on_a_rank, sizes):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
        assert len(theirs) == len(gradients) == 4
        for ours, exact in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 2.0)

    def cost(x: Tensor) -> Tensor:
        with penalty.watch():
            unit(x)
        return penalty.value()

    assert torch.autograd.gradcheck(cost, torch.randn(5, 3).double().requires_grad_())


def test_standard_units_cost_nothing_and_others_do() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 2.0)
    x = torch.tensor([[1.0], [-1.0]])
    for activations, cost in ((x, 0.0), (x + 3, 18.0), (2 * x, 18.0)):
        with penalty.watch():
            unit(activations)
        assert penalty.value().item() == pytest.approx(cost, abs=1e-12)


def test_only_watched_forwards_count_and_only_once() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    unit(torch.zeros(3))  # of a shape that would be refused
    assert penalty.value() == 0
    with penalty.watch():
        unit(torch.zeros(2, 1))
    assert penalty.value() == 1
    assert penalty.value() == 0
    penalty.remove()
    with penalty.watch():
        unit(torch.zeros(2, 1))
    assert penalty.value() == 0


def test_unit_that_does_not_vary_has_a_finite_gradient() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    x = torch.full((4, 2), 0.1, requires_grad=True)
    with penalty.watch():
        unit(x)
    penalty.value().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((4, 2), 2 * 0.1 / 2 / 4))


def test_forward_that_raises_leaves_nothing_behind() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    with suppress(RuntimeError), penalty.watch():
        unit(torch.zeros(2, 1))
        raise RuntimeError
    assert penalty.value() == 0


def test_forward_without_gradients_is_refused() -> None:
    unit = nn.Linear(3, 3)
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    x = torch.randn(4, 3, requires_grad=True)
    with penalty.watch(), pytest.raises(InputError, match="reentrant activation checkpointing"):
        checkpoint(unit, x, use_reentrant=True)


def _traffic() -> list[int]:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    x = torch.randn(4, 3, requires_grad=True)
    with recorded_all_reduces() as sent:
        with penalty.watch():
            unit(x)
        penalty.value().backward()
    return [vector.numel() for vector in sent]


def test_one_sum_is_sent_forward_and_one_backward() -> None:
    assert run_world(2, _traffic) == [[7, 7]] * 2


def _listed_in_another_order() -> float:
    model = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
    names = "ab" if dist.get_rank() == 0 else "ba"
    penalty = StatisticsPenalty({name: model[name] for name in names}, 1.0)
    with penalty.watch():
        for name in "ab":
            model[name](torch.tensor([[1.0], [-1.0]]) + (3 if name == "a" else 0))
    return penalty.value().item()


def test_units_may_be_listed_in_another_order() -> None:
    assert run_world(2, _listed_in_another_order) == [pytest.approx(9)] * 2


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_wrong_strength_is_explained(strength: float) -> None:
    with pytest.raises(InputError, match=rf"strength is {strength}; choose 0 or more"):
        StatisticsPenalty({}, strength)


def test_wrong_activations_are_explained() -> None:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    with penalty.watch(), pytest.raises(InputError, match=r"\(N, C, \*\), got \(3,\)"):
        unit(torch.zeros(3))
