"""Where a run is, and what it has come to: what a checkpoint holds besides what is trained."""

from dataclasses import dataclass, field
from typing import Self

from syncbn.train.run.checkpoint import Checkpoint, Position
from syncbn.train.step import Step, mean
from syncbn.train.tasks import Task


@dataclass
class Sums:
    """What is added up over the steps of an epoch.

    Attributes:
        loss: of all samples.
        weight: what they weigh in the mean of the loss.
        samples: how many there were, over all ranks.
        skipped: steps that left the weights as they were.
        skipped_in_a_row: of these the latest ones, without another between them.
        statistics: what the task observed.
    """

    loss: float = 0.0
    weight: float = 0.0
    samples: float = 0.0
    skipped: float = 0.0
    skipped_in_a_row: float = 0.0
    statistics: tuple[float, ...] = ()

    def add(self, step: Step) -> None:
        """Add a step of which the totals are known."""
        self.loss += step.totals.loss
        self.weight += step.weight
        self.samples += step.samples
        self.skipped += step.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step.skipped else 0
        theirs = step.totals.statistics
        ours = self.statistics or (0.0,) * len(theirs)
        self.statistics = tuple(a + b for a, b in zip(ours, theirs, strict=True))

    def metrics(self, task: Task) -> dict[str, float]:
        """Return the mean loss and the task's metrics of all samples."""
        statistics = self.statistics or (0.0,) * task.statistics
        return {"loss": mean(self.loss, self.weight), **task.metrics(statistics)}

    def to_list(self) -> list[float]:
        """Return the numbers in the order of the attributes."""
        head = [self.loss, self.weight, self.samples, self.skipped, self.skipped_in_a_row]
        return [*head, *self.statistics]

    @classmethod
    def from_list(cls, numbers: list[float]) -> Self:
        """Return what `to_list` was called on."""
        if not numbers:  # of a version that added up something else
            return cls()
        loss, weight, samples, skipped, skipped_in_a_row, *statistics = numbers
        return cls(loss, weight, samples, skipped, skipped_in_a_row, tuple(statistics))


@dataclass
class State:
    """Where a run is, and what it has come to.

    Attributes:
        position: of the next step.
        metrics: of the latest epoch; empty before its end.
        best: of the best epoch; of the latest, if nothing tells which is the best.
        sums: of the present epoch.
    """

    position: Position = field(default_factory=Position)
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    best: dict[str, float] = field(default_factory=dict[str, float])
    sums: Sums = field(default_factory=Sums)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Return what a checkpoint holds of it."""
        sums = Sums.from_list(checkpoint.sums)
        return cls(checkpoint.position, checkpoint.metrics, checkpoint.best, sums)
