"""What all ranks together say of an optimizer step: its loss, and whether somebody must stop."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn.comm.reducer import Reducer


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


class Totals(Protocol):
    """Adds up what the ranks say of each step."""

    def start(self, statement: Statement) -> None:
        """Begin to add up a step; collective."""
        ...

    def read(self) -> Report:
        """Return what the ranks said of the oldest step that has not been read; may wait for it."""
        ...


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
