from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from syncbn.errors import ConfigError
from syncbn.train.average import WeightAverage
from syncbn.train.config import compose_config
from syncbn.train.optim import can_skip, make_optimizer, take_step
from syncbn.train.schedule import Schedule


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


FUSED = [
    ["optim=sgd"],
    ["optim=sgd", "optim.momentum=0"],
    ["optim=adamw"],
]


def _scaler(precision: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=precision == "float16")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("overrides", FUSED)
def test_skipped_step_leaves_weights_and_state_as_if_it_had_not_been(
    overrides: list[str], clip_norm: float | None, precision: str
) -> None:
    config = compose_config([*overrides, "optim.lr=0.1", "optim.weight_decay=0.5"]).optim
    start = torch.randn(5)
    weights: list[torch.Tensor] = []
    for skips in ((1, 0, 1, 0, 0), (0, 0, 0)):  # a first step that is skipped is a case of its own
        weight = start.clone().requires_grad_()
        optimizer, scaler = make_optimizer([weight], config), _scaler(precision)
        assert can_skip(optimizer)
        made = 0
        for skip in skips:
            made += not skip
            weight.grad = torch.full((5,), torch.nan) if skip else start.cos() + made
            weight.grad = scaler.scale(weight.grad)
            take_step(optimizer, scaler, clip_norm, skip=torch.tensor(float(skip)))
        weights.append(weight.detach())
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("overrides", FUSED)
def test_step_that_is_not_skipped_is_the_plain_one(overrides: list[str]) -> None:
    config = compose_config([*overrides, "optim.lr=0.1"]).optim
    start = torch.randn(5)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    for weight, skip in ((ours, torch.zeros(())), (theirs, None)):
        optimizer, scaler = make_optimizer([weight], config), _scaler("float32")
        for step in range(3):
            weight.grad = start.cos() + step
            take_step(optimizer, scaler, None, skip=skip)
    assert torch.equal(ours, theirs)


def test_gradients_that_overflow_in_the_first_step_leave_no_momentum() -> None:
    config = compose_config(["optim=sgd", "optim.lr=0.1", "optim.weight_decay=0"]).optim
    weight = torch.ones(3, requires_grad=True)
    optimizer, scaler = make_optimizer([weight], config), _scaler("float16")
    for gradient in (torch.inf, 1.0):
        weight.grad = scaler.scale(torch.full((3,), gradient))
        take_step(optimizer, scaler, None)
    (momentum,) = (state["momentum_buffer"] for state in optimizer.state.values())
    assert torch.equal(momentum, torch.ones(3))


def test_optimizers_that_cannot_skip_say_so() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not can_skip(make_optimizer([weight], compose_config(["optim=torch"]).optim))


def _rates(overrides: list[str], total_steps: int, steps_per_epoch: int) -> list[float]:
    config = compose_config(["optim.lr=0.5", *overrides])
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], config.optim)
    schedule = Schedule(optimizer, config.schedule, total_steps, steps_per_epoch)
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


def test_average_can_be_given_the_buffers_of_another_moment() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    now, before = WeightAverage(model, decay=0.75), WeightAverage(model, decay=0.75)
    for _ in range(3):
        model(torch.randn(8, 2))
        kept = [buffer.clone() for buffer in model.buffers()]
        now.update_parameters(model)
        model(torch.randn(8, 2))  # moves the buffers, and nothing else
        before.update_parameters(model, kept)
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
    for name, value in now.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name


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
