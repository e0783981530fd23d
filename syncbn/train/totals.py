"""What all ranks together say of an optimizer step: its loss, and whether somebody must stop.

Ranks on the CPU add it up at once. Ranks on GPUs have it added up beside their other work, and look
at it one step later, when it has long been there; whether the loss is finite the device tells the
optimizer itself.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.reducer import Reducer
from syncbn.errors import ReplicaError

# How often a host looks whether its device has got there. Another step is waiting on the device
# meanwhile, so that the delay costs nothing.
_POLL_S = 0.0005


class StepTotals(NamedTuple):
    """Sums over all ranks.

    Attributes:
        loss: over the samples of the step, in nats.
        correct: how many of them were classified right.
        stop_signals: the numbers of the signals that told ranks to stop; 0 if none was told to.
        failures: how many ranks have not been able to write something.
    """

    loss: float
    correct: float
    stop_signals: float
    failures: float


@dataclass(frozen=True)
class Statement:
    """What one rank says of its share of a step; the tensors are 0-d, on the rank's device.

    Attributes:
        losses: the sum of the losses of each of its batches, in nats.
        correct: how many samples of each batch were classified right.
        penalties: what was added to the cost of each batch; the same on all ranks.
        stop_signal: the number of the signal that told this rank to stop, or 0.
        failed: whether it could not write something.
    """

    losses: list[Tensor]
    correct: list[Tensor]
    penalties: list[Tensor]
    stop_signal: int
    failed: bool


@dataclass(frozen=True)
class Report:
    """What is known of a step once all ranks have spoken.

    Attributes:
        totals: the sums over all ranks.
        own_loss: this rank's part of the loss.
        penalty: the sum of what was added to the cost.
    """

    totals: StepTotals
    own_loss: float
    penalty: float


class HostTotals:
    """Adds up at once, in the memory of the host: for ranks that compute on the CPU.

    Communicates: one all-reduce of 4 float64 a step.

    Args:
        reducer: sums over the ranks.
    """

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._report: Report | None = None

    def start(self, statement: Statement) -> None:
        """Add up, and wait for the other ranks."""
        loss = sum(each.item() for each in statement.losses)
        correct = sum(each.item() for each in statement.correct)
        mine = [loss, correct, statement.stop_signal, statement.failed]
        sums = self._reducer.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        penalty = sum(each.item() for each in statement.penalties)
        self._report = Report(StepTotals(*sums), loss, penalty)

    def read(self) -> Report:
        """Return what the ranks said of the step; does not wait."""
        assert self._report is not None
        return self._report


class DeviceTotals:
    """Adds up on the device, beside its other work: no host waits for a loss just computed.

    The all-reduce is of the process group's backend for the device. With NCCL it starts once the
    forward pass is done, runs on NCCL's stream while the backward pass computes, and before DDP's
    own sums, for which the optimizer waits anyway: it holds up nothing. The host copies the result
    from a stream of its own, and asks an event whether it is there. With gloo, whose sums of a
    GPU's memory are the host's work, the host waits before the optimizer's step.

    Communicates: one all-reduce of 4 float64 a step.

    Args:
        device: where this rank computes, the current one. On the CPU everything is there at once,
            which is for tests.
        timeout_s: how long `read` waits.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._module: Any = torch.get_device_module(device)
        self._timeout_s = timeout_s
        self._stream: Any = self._module.Stream()
        # Two, as a step is started before the one before it is read.
        self._sums = tuple(_Sum(device, self._module.Event()) for _ in range(2))
        self._started = 0
        self._known = 0

    def start(self, statement: Statement) -> None:
        """Begin to add up a step, before its backward pass; the host returns at once."""
        assert self._started - self._known < 2, "a step was not read"
        self._sums[self._started % 2].start(statement)
        self._started += 1

    def diverged(self) -> Tensor:
        """Return whether the loss is not finite, for which the device waits, and not the host."""
        latest = self._sums[(self._started - 1) % 2]
        self._fetch(latest)
        latest.work.wait()
        return latest.vector[0].isfinite().logical_not().to(torch.float32)

    def read(self) -> Report:
        """Return what the ranks said of the oldest step that was not read, once it is there.

        Raises:
            ReplicaError: it is not there in time.
        """
        oldest = self._sums[self._known % 2]
        self._fetch(oldest)
        deadline = time.monotonic() + self._timeout_s
        while not oldest.event.query():
            if time.monotonic() > deadline:
                raise ReplicaError(
                    f"rank {dist.get_rank()} got no sum over the {dist.get_world_size()} ranks of "
                    f"a step within {self._timeout_s:g} s: a rank, or its GPU, is gone or hangs"
                )
            time.sleep(_POLL_S)
        self._known += 1
        *totals, own_loss, penalty = oldest.result.tolist()
        return Report(StepTotals(*totals), own_loss, penalty)

    def _fetch(self, sums: "_Sum") -> None:
        """Have the result copied to the host once it is there, beside what the device computes."""
        if not sums.fetched:
            with self._module.stream(self._stream):
                sums.work.wait()
                sums.result.copy_(sums.vector, non_blocking=True)
                sums.event.record()
            sums.fetched = True


class _Sum:
    """The memory of one step's sum: it stays, as the device may use it after the host is done.

    Attributes:
        vector: on the device: the totals, and behind them what is not summed: this rank's loss, and
            the penalty, which is the same on all.
        result: the same in the host's memory.
        work: the all-reduce.
        fetched: whether the copy to the host has been ordered.
        event: when that is done.
    """

    def __init__(self, device: torch.device, event: Any) -> None:
        pinned = device.type == "cuda"  # or else copies would wait
        size = len(StepTotals._fields)
        self.vector = torch.zeros(size + 2, dtype=torch.float64, device=device)
        self.result = torch.zeros(size + 2, dtype=torch.float64, pin_memory=pinned)
        self._said = torch.zeros(2, dtype=torch.float64, pin_memory=pinned)
        self.work: Any = None
        self.fetched = True
        self.event = event

    def start(self, statement: Statement) -> None:
        loss, correct, _, _, own_loss, penalty = self.vector.unbind()
        self.vector.zero_()
        for target, parts in (
            (loss, statement.losses),
            (correct, statement.correct),
            (penalty, statement.penalties),
        ):
            for part in parts:
                target.add_(part)
        own_loss.copy_(loss)
        self._said[0], self._said[1] = statement.stop_signal, statement.failed
        self.vector[2:4].copy_(self._said, non_blocking=True)
        self.work = dist.all_reduce(self.vector[: len(StepTotals._fields)], async_op=True)
        self.fetched = False


Totals = HostTotals | DeviceTotals
