import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from syncbn.train.config import compose_config
from syncbn.train.optim import make_optimizer, make_schedule


@pytest.mark.parametrize(("override", "expected"), [("optim=sgd", SGD), ("optim=adamw", AdamW)])
def test_optimizer_is_the_configured_one(override: str, expected: type[Optimizer]) -> None:
    config = compose_config([override, "optim.lr=0.25", "optim.weight_decay=0.5"]).optim
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], config)
    assert type(optimizer) is expected
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(4, 20), (0, 5), (100, 3), (1, 1)])
def test_learning_rate_rises_to_its_value_and_falls_to_zero(
    warmup_steps: int, total_steps: int
) -> None:
    config = compose_config([f"optim.warmup_steps={warmup_steps}", "optim.lr=0.5"]).optim
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], config)
    schedule = make_schedule(optimizer, config, total_steps)
    rates: list[float] = []
    for _ in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    peak = min(warmup_steps, total_steps - 1)
    assert rates[peak] == pytest.approx(0.5)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
