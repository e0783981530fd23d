from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from syncbn.train.config import compose_config
from syncbn.train.schedule import Plan, Schedule, share_done
from syncbn.train.schema import ScheduleConfig


def _optimizer(*rates: float) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return SGD(groups, lr=0.1)


@cache
def _config(*overrides: str) -> ScheduleConfig:
    return compose_config(overrides).schedule


def _schedule(
    overrides: list[str],
    total_steps: int,
    steps_per_epoch: int = 10,
    *,
    optimizer: Optimizer | None = None,
    plan: Plan | None = None,
) -> Schedule:
    optimizer = optimizer or _optimizer(0.5)
    return Schedule(optimizer, _config(*overrides), total_steps, steps_per_epoch, plan=plan)


def _make(schedule: Schedule, steps: int) -> list[float]:
    """Make steps; return their rates."""
    rates: list[float] = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        assert schedule.made[0] == rates[-1]
    return rates


def _of_torch(schedule: LRScheduler, steps: int) -> list[float]:
    rates: list[float] = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def _warmed_up(optimizer: Optimizer, main: LRScheduler, steps: int) -> LRScheduler:
    rise = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
    return SequentialLR(optimizer, [rise, main], milestones=[steps])


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 99, 500])
@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_rates_are_those_of_the_schedulers_of_torch(name: str, warmup_steps: int) -> None:
    rise = min(warmup_steps, 99)
    theirs = _optimizer(0.5)
    main: LRScheduler = (
        CosineAnnealingLR(theirs, 100 - rise) if name == "cosine" else ConstantLR(theirs, factor=1)
    )
    expected = _of_torch(_warmed_up(theirs, main, rise) if rise else main, 100)
    ours = _schedule([f"schedule={name}", f"schedule.warmup_steps={warmup_steps}"], 100)
    assert _make(ours, 100) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_step_without_a_rise_is_that_of_torch() -> None:
    ours = _schedule(["schedule=step", "schedule.warmup_steps=0", "schedule.every_epochs=2"], 100)
    assert _make(ours, 100) == pytest.approx(_of_torch(StepLR(_optimizer(0.5), 20, 0.1), 100))


@pytest.mark.parametrize(("total_steps", "rise"), [(100, 0.3), (17, 0.5), (7, 0.1), (2, 0.3)])
def test_one_cycle_is_that_of_torch(total_steps: int, rise: float) -> None:
    theirs = OneCycleLR(_optimizer(0.5), 0.5, total_steps, pct_start=rise, cycle_momentum=False)
    expected = [*_of_torch(theirs, total_steps - 1), float(theirs.get_last_lr()[0])]
    ours = _schedule(["schedule=one_cycle", f"schedule.rise={rise}"], total_steps)
    assert _make(ours, total_steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("total_steps", "rise"), [(10, 0.1), (4, 0.25), (2, 0.5), (1, 0.3)])
def test_one_cycle_without_a_step_to_rise_falls_from_its_highest_rate(
    total_steps: int, rise: float
) -> None:
    rates = _make(_schedule(["schedule=one_cycle", f"schedule.rise={rise}"], total_steps), 30)
    if total_steps > 1:  # torch divides by zero
        assert rates[0] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True)
    assert rates[total_steps - 1 :] == pytest.approx([0.5 / 25e4] * (31 - total_steps))


def test_step_falls_at_its_epochs_however_long_the_rise() -> None:
    overrides = ["schedule=step", "schedule.every_epochs=2", "schedule.factor=0.5"]
    rates = _make(_schedule([*overrides, "schedule.warmup_steps=5"], 60), 60)
    assert rates[5:20] == pytest.approx([0.5] * 15)
    assert rates[20:40] == pytest.approx([0.25] * 20)
    assert rates[40:] == pytest.approx([0.125] * 20)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 49, 97])
def test_step_falls_at_no_other_step_for_rounding(steps_per_epoch: int) -> None:
    overrides = ["schedule=step", "schedule.warmup_steps=0", "schedule.every_epochs=1"]
    steps = 9 * steps_per_epoch
    schedule = _schedule([*overrides, "schedule.factor=0.5"], steps, steps_per_epoch)
    expected = [0.5 * 0.5 ** (step // steps_per_epoch) for step in range(steps)]
    assert _make(schedule, steps) == expected


def test_parameter_groups_keep_their_own_rates() -> None:
    optimizer = _optimizer(0.5, 0.05)
    schedule = _schedule(["schedule.warmup_steps=3"], 20, optimizer=optimizer)
    for _ in range(20):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert [first, second] == schedule.get_last_lr()
        assert second == pytest.approx(first / 10)
        schedule.step()


SCHEDULES = (["schedule=cosine"], ["schedule=step"], ["schedule=constant"], ["schedule=one_cycle"])


@pytest.mark.parametrize("overrides", SCHEDULES)
@pytest.mark.parametrize("stop", [1, 15, 40, 79])
def test_resumed_run_has_bit_identical_rates(overrides: list[str], stop: int) -> None:
    whole = _make(_schedule(overrides, 80), 80)
    stopped = _schedule(overrides, 80)
    _make(stopped, stop)
    optimizer = _optimizer(0.5)
    resumed = _schedule(overrides, 80, optimizer=optimizer)
    resumed.load_state_dict(stopped.state_dict())
    resumed.resume_at(step=stop, total_steps=80, steps_per_epoch=10, epoch=stop / 10)
    assert optimizer.param_groups[0]["lr"] == whole[stop]
    assert resumed.made == [whole[stop - 1]]
    assert _make(resumed, 80 - stop) == whole[stop:]


def _resumed(stopped: Schedule, overrides: list[str], plan: Plan, **position: Any) -> Schedule:
    total, each = position["total_steps"], position["steps_per_epoch"]
    schedule = _schedule(overrides, total, each, plan=plan)
    schedule.load_state_dict(stopped.state_dict())
    schedule.resume_at(**position)
    return schedule


@pytest.mark.parametrize("overrides", SCHEDULES)
@pytest.mark.parametrize(("stop", "after"), [(310, 5.0), (310, 20.0), (650, 7.0), (25, 20.0)])
def test_other_number_of_ranks_goes_on_at_the_rate_where_it_stopped(
    overrides: list[str], stop: int, after: float
) -> None:
    plan = (8, None)
    stopped = _schedule(overrides, 800, 100, plan=plan)
    before = _make(stopped, stop)
    total = stop + round((800 - stop) / 100 * after)
    position = {"step": stop, "total_steps": total, "steps_per_epoch": round(after)}
    resumed = _resumed(stopped, overrides, plan, epoch=stop / 100, **position)
    rates = _make(resumed, total - stop)
    whole = _make(_schedule(overrides, 800, 100), 800)
    change = max(abs(one - next_) for one, next_ in pairwise(before))
    assert rates[0] == pytest.approx(before[-1], abs=change * max(1, 100 / after))
    if overrides[0].endswith(("cosine", "one_cycle")):
        assert rates[-1] < 0.05
        assert rates[-1] == min(rates)
    if "schedule=cosine" in overrides and stop > 20:
        same_share = [whole[min(799, stop + round(k * 100 / after))] for k in range(len(rates))]
        assert rates == pytest.approx(same_share, abs=0.01)
    _make(resumed, 3)
    if "schedule=cosine" in overrides:
        assert resumed.get_last_lr() == pytest.approx([0], abs=1e-15)


def test_other_number_of_ranks_with_a_last_step_goes_on_evenly_to_it() -> None:
    plan = (100, 60)
    stopped = _schedule(["schedule.warmup_steps=0"], 60, 10, plan=plan)
    before = _make(stopped, 30)
    position = {"step": 30, "total_steps": 60, "steps_per_epoch": 5, "epoch": 3.0}
    resumed = _resumed(stopped, ["schedule.warmup_steps=0"], plan, **position)
    rates = before + _make(resumed, 30)
    assert rates == pytest.approx(_make(_schedule(["schedule.warmup_steps=0"], 60), 60))
    assert rates == sorted(rates, reverse=True)
    assert resumed.get_last_lr() == pytest.approx([0], abs=1e-15)


@pytest.mark.parametrize("overrides", SCHEDULES)
def test_extended_run_has_the_rates_of_one_that_was_longer_from_here(overrides: list[str]) -> None:
    stopped = _schedule(overrides, 120, 10, plan=(12, None))
    _make(stopped, 120)
    position = {"step": 120, "total_steps": 200, "steps_per_epoch": 10, "epoch": 12.0}
    resumed = _resumed(stopped, overrides, (20, None), **position)
    assert _make(resumed, 80) == pytest.approx(_make(_schedule(overrides, 200), 200)[120:])


def test_rise_that_a_resume_interrupts_goes_on() -> None:
    overrides = ["schedule.warmup_steps=20"]
    stopped = _schedule(overrides, 100, 10, plan=(10, None))
    before = _make(stopped, 10)
    position = {"step": 10, "total_steps": 190, "steps_per_epoch": 20, "epoch": 1.0}
    resumed = _resumed(stopped, overrides, (10, None), **position)
    rates = before + _make(resumed, 180)
    assert rates[:21] == pytest.approx([0.5 * (step + 1) / 21 for step in range(21)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert resumed.get_last_lr() == pytest.approx([0], abs=1e-15)


def test_run_that_changes_twice_stays_at_its_share() -> None:
    overrides, plan = ["schedule.warmup_steps=20"], (10, None)
    first = _schedule(overrides, 1000, 100, plan=plan)
    _make(first, 300)
    position = {"step": 300, "total_steps": 650, "steps_per_epoch": 50, "epoch": 3.0}
    second = _resumed(first, overrides, plan, **position)
    _make(second, 150)
    position = {"step": 450, "total_steps": 850, "steps_per_epoch": 100, "epoch": 6.0}
    third = _resumed(second, overrides, plan, **position)
    assert third.place.share == pytest.approx(0.6)
    whole = _make(_schedule(overrides, 1000), 1000)
    assert _make(third, 400) == pytest.approx(whole[600:])


def test_rate_of_the_configuration_is_that_of_the_resumed_run() -> None:
    stopped = _schedule([], 100)
    _make(stopped, 50)
    optimizer = _optimizer(0.05)
    resumed = _schedule([], 100, optimizer=optimizer)
    resumed.load_state_dict(stopped.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(stopped.get_last_lr()[0] / 10)


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "sequential"])
def test_state_of_an_earlier_version_gives_the_number_of_steps(name: str) -> None:
    theirs = _optimizer(0.5)
    overrides = ["schedule=one_cycle" if name == "one_cycle" else "schedule.warmup_steps=0"]
    old: LRScheduler
    match name:
        case "cosine":
            old = CosineAnnealingLR(theirs, 100)
        case "one_cycle":
            old = OneCycleLR(theirs, 0.5, 100, cycle_momentum=False)
        case _:
            old = _warmed_up(theirs, CosineAnnealingLR(theirs, 93), 7)
            overrides = ["schedule.warmup_steps=7"]
    _of_torch(old, 40)
    schedule = _schedule(overrides, 100)
    schedule.load_state_dict(old.state_dict())
    assert schedule.get_last_lr() == pytest.approx(old.get_last_lr())
    schedule.resume_at(step=40, total_steps=100, steps_per_epoch=10, epoch=4.0)
    rates = _make(schedule, 60)
    assert rates == pytest.approx(_make(_schedule(overrides, 100), 100)[40:])


def test_share_that_is_done_counts_samples() -> None:
    assert share_done(0, 100, 10, 0.0) == 0
    assert share_done(30, 100, 10, 3.0) == pytest.approx(0.3)
    assert share_done(30, 65, 5, 3.0) == pytest.approx(0.3)
    assert share_done(100, 100, 10, 10.0) == 1
