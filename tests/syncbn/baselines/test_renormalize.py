"""Renormalizing against what it promises: standard units on the concatenated batch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.baselines import Renormalization, Renormalizer, Unit
from syncbn.errors import InputError
from tests.support.world import run_world

EPS = 1e-3


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(4, 2)).double()


def _units(model: nn.Sequential) -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    for name in ("0", "3"):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.bias is not None
        found[name] = Unit(layer.weight, layer.bias, layer)
    return found


def _share(sizes: tuple[int, ...], rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return rank + 2 * torch.randn(sizes[rank], 2, 3, 3, generator=generator).double()


def _on_a_rank(sizes: tuple[int, ...]) -> tuple[Renormalization, dict[str, Tensor]]:
    model = _model()
    x = _share(sizes, dist.get_rank())
    done = Renormalizer(_units(model), EPS).step(lambda: model(x))
    return done, model.state_dict()


def _activations(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    first = model[0](x)
    return [first.movedim(1, -1).reshape(-1, 3), model[3](model[2](model[1](first)))]


@pytest.mark.parametrize("sizes", [(5,), (4, 4), (1, 5, 3), (0, 6)])
def test_all_units_are_standard_on_the_global_batch(sizes: tuple[int, ...]) -> None:
    parts = run_world(len(sizes), _on_a_rank, sizes)
    x = torch.cat([_share(sizes, rank) for rank in range(len(sizes))])
    model, before = _model(), _model()
    model.load_state_dict(parts[0][1])
    for part in parts:
        assert part[0] == parts[0][0]
        assert all(torch.equal(value, parts[0][1][key]) for key, value in part[1].items())
    for activations in _activations(model, x):
        torch.testing.assert_close(activations.mean(0), torch.zeros(len(activations[0])).double())
        # eps lets a little of the variance go.
        variance = activations.var(0, correction=0)
        assert ((variance > 1 - 0.1) & (variance < 1)).all()
    # The first layer's variance was σ₀², and is σ₀²/(σ₀² + eps).
    old = _activations(before, x)[0].var(0, correction=0)
    new = _activations(model, x)[0].var(0, correction=0)
    torch.testing.assert_close(new, old / (old + EPS))
    # What feeds no unit stays.
    assert torch.equal(model.state_dict()["5.weight"], before.state_dict()["5.weight"])


def test_what_was_undone_is_measured() -> None:
    layer = nn.Linear(1, 1, dtype=torch.float64)
    renormalizer = Renormalizer({"unit": Unit(layer.weight, layer.bias, layer)}, eps=1e-12)
    with torch.no_grad():
        layer.weight.fill_(3)
        layer.bias.fill_(5)
    x = torch.tensor([[1.0], [-1.0]]).double()
    first = renormalizer.step(lambda: layer(x))
    assert first.mean_shift == pytest.approx(5)
    assert first.log_scale == pytest.approx(math.log(3))
    again = renormalizer.step(lambda: layer(x))
    assert again.mean_shift == pytest.approx(0, abs=1e-9)
    assert again.log_scale == pytest.approx(0, abs=1e-9)


def test_scale_between_weight_and_bias_is_left_alone() -> None:
    weight, bias = (nn.Parameter(torch.full(shape, 3.0)) for shape in ((1, 1), (1,)))

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 7 * x @ weight.T + bias

    module = Scaled()
    x = torch.tensor([[1.0], [-1.0]])
    Renormalizer({"unit": Unit(weight, bias, module)}, eps=1e-9).step(lambda: module(x))
    torch.testing.assert_close(module(x).detach(), x)
    torch.testing.assert_close(weight.detach(), torch.full((1, 1), 1 / 7))


def test_unit_that_does_not_vary_keeps_its_scale() -> None:
    layer = nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0] = 0
    before = layer.weight.detach().clone()
    renormalizer = Renormalizer({"unit": Unit(layer.weight, layer.bias, layer)}, EPS)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    for batch in (x, torch.ones(5, 2).double()) * 10:
        renormalizer.step(lambda batch=batch: layer(batch))
    assert torch.equal(layer.weight[0], before[0])
    y = layer(torch.ones(5, 2).double())
    torch.testing.assert_close(y, torch.zeros(5, 3).double())
    # What does vary is of its own size, however often another batch did not.
    assert ((layer(x).var(0, correction=0)[1:] - 1).abs() < 0.1).all()


def _without_samples() -> bool:
    model = _model()
    done = Renormalizer(_units(model)).step(lambda: model(torch.zeros(0, 2, 3, 3).double()))
    same = all(
        torch.equal(value, _model().state_dict()[key]) for key, value in model.state_dict().items()
    )
    return same and done == Renormalization(0.0, 0.0)


def test_batch_without_samples_changes_nothing() -> None:
    assert run_world(2, _without_samples) == [True, True]


def _refused(model: nn.Sequential, units: dict[str, Unit], x: Tensor, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        Renormalizer(units).step(lambda: model(x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(model(x), model(x)) or not x.isfinite().all()  # no hook is left


def test_what_cannot_be_renormalized_is_explained_and_changes_nothing() -> None:
    x = _share((5,), 0)
    model = _model()
    units = _units(model)
    _refused(model, units, x * torch.inf, "the statistics of unit '0' are not finite")
    _refused(model, {**units, "5": Unit(*_pair(3), nn.Identity())}, x, "never calls the units 5")
    wrong = {**units, "3": Unit(*_pair(3), model[3])}
    _refused(model, wrong, x, r"unit '3' has 3 biases, but outputs of shape \(5, 4\)")
    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double()
    twice.append(twice[0])
    layer = twice[0]
    assert isinstance(layer, nn.Linear)
    shared = {"0": Unit(layer.weight, layer.bias, layer)}
    _refused(twice, shared, torch.randn(5, 2).double(), "unit '0' is called twice")
    _refused(twice, shared, torch.randn(1, 2).double(), "expected more than 1 value per channel")


def _pair(channels: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(channels, 2)), nn.Parameter(torch.zeros(channels))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(InputError, match="eps is 0; choose a positive one"):
        Renormalizer({}, eps=0)
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match=r"'a' has a weight of shape \(3, 2\) and a bias of shape"):
        Renormalizer({"a": Unit(weight, bias, nn.Identity())})
