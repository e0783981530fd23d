"""How far a device has come: numbers that it writes into the host's memory as it gets there."""

from typing import NamedTuple

import torch
from torch import Tensor


class Mark(NamedTuple):
    """A number for a device to write when it gets to a place in what it has been given to do.

    Attributes:
        slot: where to write it: one int64 in memory of the host that the device can reach.
        number: what to write.
    """

    slot: Tensor
    number: int

    def leave(self, device: torch.device) -> None:
        """Let a device write the number after what it has been given so far."""
        number = torch.full((1,), self.number, dtype=torch.int64, device=device)
        self.slot.copy_(number, non_blocking=True)


class Marks(NamedTuple):
    """What to write around an exchange.

    Attributes:
        before: when this replica's share is there, and the device waits for the others.
        after: when theirs has come.
    """

    before: Mark
    after: Mark
