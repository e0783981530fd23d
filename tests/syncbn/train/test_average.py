import pytest
import torch
from torch import nn

from syncbn.train.average import WeightAverage


def _weight(average: WeightAverage) -> float:
    return float(average.module.get_parameter("weight").detach())


def test_average_with_warm_up_has_left_the_first_weights_in_a_short_run() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.999, warmup=True)
    slow = WeightAverage(model, decay=0.999)
    expected = 0.0
    for step in range(100):
        with torch.no_grad():
            model.weight.fill_(0.0 if step == 0 else 1.0)
        average.update_parameters(model)
        slow.update_parameters(model)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = 0.0 if step == 0 else decay * expected + 1 - decay
    assert _weight(average) == pytest.approx(expected)
    assert _weight(average) > 0.999
    assert _weight(slow) < 0.1


def test_warm_up_ends_at_the_configured_decay_and_goes_on_after_a_resume() -> None:
    model = nn.Linear(1, 1, bias=False)
    average, resumed = (WeightAverage(model, decay=0.5, warmup=True) for _ in range(2))
    for step in range(30):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update_parameters(model)
        if step == 20:
            resumed.load_state_dict(average.state_dict())
        elif step > 20:
            resumed.update_parameters(model)
    assert _weight(resumed) == _weight(average)
    # (1 + n) / (10 + n) has been above a half for so long that it has left no trace.
    assert _weight(average) == pytest.approx(28, abs=0.01)
