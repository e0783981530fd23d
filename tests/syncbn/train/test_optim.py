from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from syncbn.errors import ConfigError
from syncbn.train.config import compose_config
from syncbn.train.optim import WeightAverage, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("override", "expected"), [("optim=sgd", SGD), ("optim=adamw", AdamW), ("optim=torch", RMSprop)]
)
def test_optimizer_is_the_configured_one(override: str, expected: type[Optimizer]) -> None:
    decay = "+optim.arguments.weight_decay" if override == "optim=torch" else "optim.weight_decay"
    config = compose_config([override, "optim.lr=0.25", f"{decay}=0.5"]).optim
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], config)
    assert type(optimizer) is expected
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("override", "plain"), [("optim=sgd", SGD), ("optim=adamw", AdamW)])
def test_step_is_that_of_the_plain_optimizer(
    override: str, plain: type[Optimizer], dtype: torch.dtype
) -> None:
    config = compose_config([override, "optim.lr=0.1", "optim.weight_decay=0.5"]).optim
    start = torch.randn(5, dtype=dtype)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    arguments: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    if plain is SGD:
        arguments |= {"momentum": 0.9, "nesterov": True}
    for optimizer, weight in (
        (make_optimizer([ours], config), ours),
        (plain([theirs], **arguments), theirs),
    ):
        for step in range(3):
            weight.grad = start.cos() + step
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_arguments_that_do_not_fit_are_refused() -> None:
    config = compose_config(["optim=torch", "+optim.arguments.alfa=0.5"]).optim
    with pytest.raises(ConfigError, match=r"optim.arguments=\{'alfa': 0.5\} do not fit RMSprop: "):
        make_optimizer([torch.zeros(1, requires_grad=True)], config)


def _rates(overrides: list[str], total_steps: int, steps_per_epoch: int) -> list[float]:
    config = compose_config(["optim.lr=0.5", *overrides])
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], config.optim)
    schedule = make_schedule(optimizer, config.schedule, total_steps, steps_per_epoch)
    rates: list[float] = []
    for _ in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return [*rates, float(optimizer.param_groups[0]["lr"])]


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(4, 20), (0, 5), (100, 3), (1, 1)])
def test_cosine_rises_to_its_rate_and_falls_to_zero(warmup_steps: int, total_steps: int) -> None:
    rates = _rates([f"schedule.warmup_steps={warmup_steps}"], total_steps, 10)
    peak = min(warmup_steps, total_steps - 1)
    assert rates[peak] == pytest.approx(0.5)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_step_falls_every_few_epochs() -> None:
    overrides = ["schedule=step", "schedule.warmup_steps=0", "schedule.every_epochs=2"]
    rates = _rates(overrides, 12, 3)
    assert rates[:12] == pytest.approx([0.5] * 6 + [0.05] * 6)


def test_constant_stays_after_its_rise() -> None:
    rates = _rates(["schedule=constant", "schedule.warmup_steps=3"], 8, 4)
    assert rates[0] < rates[1] < rates[2] < 0.5
    assert rates[3:] == pytest.approx([0.5] * 6)


def test_one_cycle_peaks_after_its_rise() -> None:
    rates = _rates(["schedule=one_cycle", "schedule.rise=0.25"], 40, 10)
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 9
    assert rates[39] < 1e-3


def test_average_follows_weights_and_statistics_and_copies_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = WeightAverage(model, decay=0.75)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        model(torch.randn(8, 2))
        with torch.no_grad():
            model[0].weight.add_(1)  # pyright: ignore[reportArgumentType, reportCallIssue] -- a Sequential's items are typed as Module
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            first = step == 0 or not value.is_floating_point()
            expected[name] = value.clone() if first else 0.75 * expected[name] + 0.25 * value
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert average.module.state_dict()["1.num_batches_tracked"] == 3
