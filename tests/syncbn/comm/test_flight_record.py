"""What is logged before NCCL's watchdog ends a process that waits for another one."""

import logging
import time
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn
from syncbn.comm import exchange, flight_record
from syncbn.comm.flight_record import FlightRecord, record_of
from syncbn.errors import ReplicaError
from tests.support.interpreted import tiles_of
from tests.support.world import run_world


def _record() -> tuple[FlightRecord, torch.Tensor]:
    slot = torch.zeros(1, dtype=torch.int64)
    return FlightRecord(slot, period_s=0.01), slot


def _wait_for(lines: list[str], caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 10
    while len(caplog.records) < len(lines) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == lines


def test_the_exchange_that_a_device_waits_in_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record, slot = _record()
    places = ["the forward of 'first'", "the forward of 'second'", "the backward of 'second'"]
    marks = [record.depart(lambda place=place: f"rank 1 is at {place}", 0.2) for place in places]
    # The host is ahead: the device has done the first and waits in the second.
    for mark in (*marks[0], marks[1].before):
        mark.leave(slot.device)
    _wait_for(["rank 1 is at the forward of 'second'"], caplog)
    assert "a rank died, or did not call this layer" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR
    time.sleep(0.3)
    assert len(caplog.records) == 1
    for mark in (marks[1].after, marks[2].before):
        mark.leave(slot.device)
    _wait_for([f"rank 1 is at {place}" for place in places[1:]], caplog)


def test_a_device_that_has_nothing_to_wait_for_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record, slot = _record()
    marks = record.depart(lambda: "rank 0 is somewhere", 0.1)
    time.sleep(0.3)  # not there yet, because it computes
    for mark in marks:
        mark.leave(slot.device)
    time.sleep(0.3)
    assert not caplog.records


def test_record_made_in_inference_mode_is_written_in_training() -> None:
    device = torch.device("cuda", 0)
    with (
        mock.patch.dict(flight_record._records),  # pyright: ignore[reportPrivateUsage] -- of a GPU that is not here
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(Tensor, "pin_memory", Tensor.clone),
        torch.inference_mode(),
    ):
        record = record_of(device)
    assert record is not None
    marks = record.depart(str, 60.0)
    marks.before.leave(torch.device("cpu"))
    assert marks.before.slot == 2


def test_a_group_that_is_gone_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    record, slot = _record()

    def position() -> str:
        raise ReplicaError("the process group has been destroyed")

    record.depart(position, 0.1).before.leave(slot.device)
    time.sleep(0.3)
    assert not caplog.records


def test_what_was_long_ago_is_forgotten() -> None:
    record, _ = _record()
    for _ in range(5000):
        record.depart(str, 60.0)
    assert len(record._exchanges) == 4096  # pyright: ignore[reportPrivateUsage] -- its memory


def _gradient(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x).pow(3).sum(), x)[0]


def _observed_steps(kernels: str, exchanges: int) -> None:
    slot = torch.zeros(1, dtype=torch.int64)
    layer, x = syncbn.SyncBatchNorm(3, track_running_stats=False), torch.randn(4, 3, 2)
    with (
        mock.patch.dict("os.environ", SYNCBN_KERNELS=kernels),
        mock.patch.object(exchange, "record_of", return_value=FlightRecord(slot)),
        tiles_of(64),
    ):
        expected = _gradient(layer, x)
        assert slot == 2 * exchanges + 1
        recorded = make_fx(partial(_gradient, layer))(x)
        torch.testing.assert_close(recorded(x), expected)
        with FakeTensorMode():
            gradient = _gradient(syncbn.SyncBatchNorm(3), torch.randn(4, 3))
        assert isinstance(gradient, FakeTensor)
        assert slot == 2 * exchanges + 1
        gradient = torch.func.grad(lambda x: layer(x).pow(3).sum())(x)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_steps_that_torch_records_or_transforms_work_without_marks(kernels: str) -> None:
    run_world(2, _observed_steps, kernels, 2)
