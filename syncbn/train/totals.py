"""What all ranks together say of an optimizer step: its loss, and whether somebody must stop.

Ranks on the CPU add it up at once. Ranks on GPUs have it added up beside their other work, and look
at it one step later, when it has long been there; whether the loss is finite the device tells the
optimizer itself.
"""

import dataclasses
import time
from collections.abc import Sequence
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
# What stands before the statistics: loss, stop signals, failures.
_HEAD = 3


class StepTotals(NamedTuple):
    """Sums over all ranks.

    Attributes:
        loss: over the samples of the step.
        stop_signals: the numbers of the signals that told ranks to stop; 0 if none was told to.
        failures: how many ranks have not been able to write something.
        statistics: what the task observed of the samples.
    """

    loss: float
    stop_signals: float
    failures: float
    statistics: tuple[float, ...]


@dataclass(frozen=True)
class Statement:
    """What one rank says of its share of a step; the tensors are 0-d, on the rank's device.

    Attributes:
        losses: the sum of the losses of each of its batches.
        statistics: what the task observed of each batch, shape (S,), float64.
        penalties: what was added to the cost of each batch; the same on all ranks.
        stop_signal: the number of the signal that told this rank to stop, or 0.
        failed: whether it could not write something.
    """

    losses: list[Tensor]
    statistics: list[Tensor]
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
        skipped: whether the gradient was not finite, so that the weights were left as they were.
            Known once `note_skip` was called.
    """

    totals: StepTotals
    own_loss: float
    penalty: float
    skipped: bool


class HostTotals:
    """Adds up at once, in the memory of the host: for ranks that compute on the CPU.

    Communicates: one all-reduce of 3 + S float64 a step, S numbers being the task's statistics.

    Args:
        reducer: sums over the ranks.
    """

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._report: Report | None = None

    def start(self, statement: Statement) -> None:
        """Add up, and wait for the other ranks."""
        loss = sum(each.item() for each in statement.losses)
        mine = [loss, statement.stop_signal, statement.failed]
        statistics = torch.stack(statement.statistics).sum(0).cpu()
        vector = torch.cat([torch.tensor(mine, dtype=torch.float64), statistics])
        penalty = sum(each.item() for each in statement.penalties)
        self._report = Report(_totals(self._reducer.sum(vector).tolist()), loss, penalty, False)

    def read(self) -> Report:
        """Return what the ranks said of the step; does not wait."""
        assert self._report is not None
        return self._report

    def note_skip(self, skipped: Tensor) -> None:
        """Note whether the gradient was not finite; the host waits for the device."""
        assert self._report is not None
        self._report = dataclasses.replace(self._report, skipped=bool(skipped))


class DeviceTotals:
    """Adds up on the device, beside its other work: no host waits for a loss just computed.

    The all-reduce is of the process group's backend for the device. With NCCL it starts once the
    forward pass is done, runs on NCCL's stream while the backward pass computes, and before DDP's
    own sums, for which the optimizer waits anyway: it holds up nothing. The host copies the result
    from a stream of its own, and asks an event whether it is there. With gloo, whose sums of a
    GPU's memory are the host's work, the host waits before the optimizer's step.

    Communicates: one all-reduce of 3 + S float64 a step, S numbers being the task's statistics.

    Args:
        device: where this rank computes, the current one. On the CPU everything is there at once,
            which is for tests.
        timeout_s: how long `read` waits.
        statistics: S.
    """

    def __init__(self, device: torch.device, timeout_s: float, statistics: int) -> None:
        self._module: Any = torch.get_device_module(device)
        self._timeout_s = timeout_s
        self._stream: Any = self._module.Stream()
        # Two, as a step is started before the one before it is read.
        self._sums = tuple(_Sum(device, self._module, statistics) for _ in range(2))
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

    def note_skip(self, skipped: Tensor) -> None:
        """Have it known at the next `read` whether the latest step's gradient was not finite.

        Args:
            skipped: 0-d, on the device: 1 if the weights were left as they were.
        """
        self._sums[(self._started - 1) % 2].note_skip(skipped)

    def read(self) -> Report:
        """Return what the ranks said of the oldest step that was not read, once it is there.

        Raises:
            ReplicaError: it is not there in time.
        """
        oldest = self._sums[self._known % 2]
        self._fetch(oldest)
        deadline = time.monotonic() + self._timeout_s
        while not oldest.is_there():
            if time.monotonic() > deadline:
                raise ReplicaError(
                    f"rank {dist.get_rank()} got no sum over the {dist.get_world_size()} ranks of "
                    f"a step within {self._timeout_s:g} s: a rank, or its GPU, is gone or hangs"
                )
            time.sleep(_POLL_S)
        self._known += 1
        *totals, own_loss, penalty = oldest.result.tolist()
        return Report(_totals(totals), own_loss, penalty, oldest.was_skipped())

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

    def __init__(self, device: torch.device, module: Any, statistics: int) -> None:
        pinned = device.type == "cuda"  # or else copies would wait
        size = self._size = _HEAD + statistics
        self.vector = torch.zeros(size + 2, dtype=torch.float64, device=device)
        self.result = torch.zeros(size + 2, dtype=torch.float64, pin_memory=pinned)
        self._said = torch.zeros(2, dtype=torch.float64, pin_memory=pinned)
        self.work: Any = None
        self.fetched = True
        self.event = module.Event()
        self._skipped = torch.zeros(1, dtype=torch.float32, pin_memory=pinned)
        self._skip_event = module.Event()
        self._skip_noted = False

    def note_skip(self, skipped: Tensor) -> None:
        self._skipped.copy_(skipped.reshape(1), non_blocking=True)
        self._skip_event.record()
        self._skip_noted = True

    def is_there(self) -> bool:
        return self.event.query() and (not self._skip_noted or self._skip_event.query())

    def was_skipped(self) -> bool:
        return self._skip_noted and self._skipped.tolist() == [1.0]

    def start(self, statement: Statement) -> None:
        self._skip_noted = False
        loss, (own_loss, penalty) = self.vector[0], self.vector[self._size :]
        self.vector.zero_()
        for target, parts in (
            (loss, statement.losses),
            (self.vector[_HEAD : self._size], statement.statistics),
            (penalty, statement.penalties),
        ):
            for part in parts:
                target.add_(part)
        own_loss.copy_(loss)
        self._said[0], self._said[1] = statement.stop_signal, statement.failed
        self.vector[1:_HEAD].copy_(self._said, non_blocking=True)
        self.work = dist.all_reduce(self.vector[: self._size], async_op=True)
        self.fetched = False


Totals = HostTotals | DeviceTotals


def _totals(sums: Sequence[float]) -> StepTotals:
    loss, stop_signals, failures = sums[:_HEAD]
    return StepTotals(loss, stop_signals, failures, tuple(sums[_HEAD:]))
