"""What goes between the replicas: shifts, their agreement, and failures that explain themselves."""

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn import _native
from syncbn.comm.exchange import _move  # pyright: ignore[reportPrivateUsage] -- both of its versions are compared
from syncbn.environment import DEBUG
from syncbn.errors import InputError, ReplicaError
from tests.support.world import WorldError, run_world

CHANNELS = 4


class _Net(nn.Module):
    def __init__(self, second: int = CHANNELS) -> None:
        super().__init__()
        self.first = syncbn.SyncBatchNorm(CHANNELS)
        self.second = syncbn.SyncBatchNorm(second)


def _batch(channels: int = CHANNELS, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank() if rank is None else rank)
    return torch.randn(8, channels, generator=generator)


# The shift.


def _far_from_zero(mean: float, std: float) -> list[float]:
    """Return σ²'s relative error in float32, step by step."""
    layer = syncbn.SyncBatchNorm(CHANNELS, momentum=1.0, affine=False)
    layer.running_var = layer.running_var.double()  # pyright: ignore[reportOptionalMemberAccess] -- it tracks
    errors: list[float] = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(dist.get_world_size() * 500, CHANNELS, generator=generator)
        x = (mean + std * noise.double()).float()
        layer(x.chunk(dist.get_world_size())[dist.get_rank()])
        truth = x.double().var(0)
        errors.append(((layer.running_var - truth) / truth).abs().max().item())
    return errors


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (-1e6, 1.0), (1e3, 1.0), (0.0, 1.0)])
def test_variance_is_exact_far_from_zero_once_a_batch_was_seen(mean: float, std: float) -> None:
    for cold, *warm in run_world(3, _far_from_zero, mean, std):
        assert cold < 3e-4  # torch's own layer: 2.9e-4
        assert max(warm) < 1e-6


NAN, INF = math.nan, math.inf
SUMS = {
    "a batch": [4.0, 8, -2, 1, 9, 9, 9],
    "nothing": [0.0, 0, 0, 0, 0, 0, 0],
    "no count": [NAN, 8, -2, 1, 9, 9, 9],
    "some channels not finite": [4.0, NAN, INF, -1, 9, 9, 9],
}


@pytest.mark.parametrize("about_shift", [True, False])
@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_shift_moves_to_the_mean_if_that_is_finite(
    total: list[float], about_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, count = [0.1, 0.2, 0.3], total[0]
    shifts: list[Tensor] = []
    for library in (_native.library, None):
        monkeypatch.setattr(_native, "library", library)
        shifts.append(torch.tensor(before, dtype=torch.float64))
        _move(shifts[-1], torch.tensor(total, dtype=torch.float64), about_shift)
    assert torch.equal(*shifts)
    for moved, old, first in zip(shifts[0].tolist(), before, total[1:4], strict=True):
        known = count > 0 and math.isfinite(first)
        assert moved == (first / count + (old if about_shift else 0) if known else old)


def _nan_then_well() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS, track_running_stats=False)
    assert layer(_batch() * math.nan).isnan().all()
    assert layer(_batch()).isfinite().all()


def test_a_batch_of_nan_does_not_spoil_the_next() -> None:
    run_world(2, _nan_then_well)


# Failures that explain themselves: pytorch#44957, and what no torch reports at all.


def _error_of(call: Callable[[], object]) -> str:
    start = time.monotonic()
    with pytest.raises(ReplicaError) as caught:
        call()
    assert time.monotonic() - start < 20
    return str(caught.value)


def _in_another_order(warm: bool) -> str:
    model = _Net()
    if warm:
        model.second(_batch() + 1)
        model.first(_batch())
    return _error_of(lambda: (model.first if dist.get_rank() else model.second)(_batch()))


def test_layers_in_another_order_are_noticed_without_being_asked() -> None:
    for message in run_world(2, _in_another_order, True):
        assert "rank 0 is at the forward of 'second' (4 channels, float32)" in message
        assert "rank 1 is at the forward of 'first'" in message


def _checked(case: str) -> str:
    # Ranks are forked from a server, which does not see what the test sets.
    with mock.patch.dict(os.environ, {DEBUG: "3"}):
        rank = dist.get_rank()
        model = _Net(second=CHANNELS + 2)
        match case:
            case "order":
                return _in_another_order(False)
            case "channels":
                return _error_of(lambda: model.second(_batch(6)) if rank else model.first(_batch()))
            case "dtype":
                return _error_of(
                    lambda: model.first(_batch().to([torch.float32, torch.float64][rank]))
                )
            case "skipped":
                if rank:
                    time.sleep(5)
                    return ""
                return _error_of(lambda: model.first(_batch()))
            case "no backward":
                loss = model.first(_batch().requires_grad_()).sum()
                if rank:
                    time.sleep(5)
                    return ""
                return _error_of(loss.backward)
            case _:
                raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("order", ["rank 0 is at the forward of 'second'", "rank 1 is at the forward of 'first'"]),
        ("channels", ["'first' (4 channels, float32)", "'second' (6 channels, float32)"]),
        ("dtype", ["rank 0 is at the forward of 'first' (4 channels, float32)", "float64"]),
        ("skipped", ["rank 0 is at the forward of 'first'", "rank 1 has said nothing for 3 s"]),
        ("no backward", ["the backward of 'first'", "rank 1 has said nothing for 3 s"]),
    ],
)
def test_checked_calls_name_layer_rank_and_difference(case: str, parts: list[str]) -> None:
    messages = [message for message in run_world(2, _checked, case) if message]
    assert messages
    for message in messages:
        assert all(part in message for part in parts), message


def _refused_on_one_rank(checked: bool) -> str:
    settings = {DEBUG: "3"} if checked else {}
    with mock.patch.dict(os.environ, settings):
        model = _Net()
        x = _batch(CHANNELS + dist.get_rank())
        if dist.get_rank() == 0:
            return _error_of(lambda: model.first(x))
        with pytest.raises(InputError) as caught:
            model.first(x)
        return str(caught.value)


@pytest.mark.parametrize("checked", [False, True])
def test_input_refused_on_one_rank_ends_the_call_on_all(checked: bool) -> None:
    other, own = run_world(2, _refused_on_one_rank, checked)
    assert own == "expected an input of shape (N, 4, *), got (8, 5)"
    assert (
        f"rank 1 is at the forward of 'first' (4 channels, float32) and refuses its input: {own}"
        in other
    )


def _pruned_on_one_rank() -> str:
    model = _Net()
    if dist.get_rank() == 0:
        return _error_of(lambda: model.first(_batch()))
    model.first.weight = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError) as caught:
        model.first(_batch())
    return str(caught.value)


def test_parameter_refused_on_one_rank_ends_the_call_on_all() -> None:
    other, own = run_world(2, _pruned_on_one_rank)
    assert own == "expected a weight of shape (4,) like the input's channels, got (2,)"
    assert (
        f"rank 1 is at the forward of 'first' (4 channels, float32) and refuses its input: {own}"
        in other
    )


def _killed(file: Path) -> None:
    model = _Net()
    model.first(_batch())
    if dist.get_rank() == 1:
        time.sleep(0.5)  # its peer is waiting in the all-reduce by then
        os.kill(os.getpid(), signal.SIGKILL)
    file.write_text(_error_of(lambda: model.first(_batch())))


def test_rank_killed_amid_a_collective_leaves_no_peer_hanging(tmp_path: Path) -> None:
    file = tmp_path / "message"
    with pytest.raises(WorldError, match="rank 1 died without a word"):
        run_world(2, _killed, file, grace_s=20)
    message = file.read_text()
    assert message.startswith(
        "rank 0 is at the forward of 'first' (4 channels, float32) and got no"
    )
    assert "A rank died, or did not call this layer" in message


@pytest.mark.parametrize("setting", ["soon", "0", "-1", "inf", "nan"])
def test_meaningless_debug_setting_is_refused(setting: str) -> None:
    messages = run_world(2, _with_setting, setting)
    assert all(message.startswith(f"{DEBUG} is {setting!r}; set it to") for message in messages)


def _with_setting(setting: str) -> str:
    with (
        mock.patch.dict(os.environ, {DEBUG: setting}),
        pytest.raises(InputError) as caught,
    ):
        _Net().first(_batch())
    return str(caught.value)
