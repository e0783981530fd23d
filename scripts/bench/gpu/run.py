"""What the sections of a run share: the device, and until when each may go on."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Run:
    """A run of the benchmark.

    Attributes:
        device: that is measured; the CPU, on which the kernels are interpreted, to try it out.
        deadline: of the present section, by time.monotonic.
    """

    device: torch.device
    deadline: float

    @property
    def tiny(self) -> bool:
        """Whether nothing is measured, and everything small."""
        return self.device.type == "cpu"

    def until_late(self, cases: Iterable[T]) -> Iterator[T]:
        """Yield cases until the section's time is over; of the first case in any event."""
        for number, case in enumerate(cases):
            if number and time.monotonic() > self.deadline:
                print(f"out of time after {number} cases", file=sys.stderr)
                return
            yield case
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory, above all
