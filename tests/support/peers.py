"""What tests of the exchange through peers' memory do on GPUs and interpreted."""

import torch
from torch import Tensor

from syncbn.comm.symmetric_memory import SymmetricMemoryReducer


def share(rank: int, call: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(device)


def exchange(reducer: SymmetricMemoryReducer, call: int, size: int, device: torch.device) -> None:
    """Gather and sum, and check both to the last bit."""
    everyone = [share(rank, call, size, device) for rank in range(reducer.world_size)]
    mine = everyone[reducer.rank].clone()
    rows = reducer.gather(mine)
    assert torch.equal(rows, torch.stack(everyone)), call
    total = reducer.sum(mine)
    expected = everyone[0].clone()
    for theirs in everyone[1:]:
        expected += theirs
    assert torch.equal(total, expected), call
    assert torch.equal(mine, everyone[reducer.rank])


def poll_less(reducer: SymmetricMemoryReducer, polls: int) -> None:
    """Let the ranks give each other up sooner than the time-out of their group would."""
    boxes = reducer._mailboxes  # pyright: ignore[reportPrivateUsage] -- nobody else sets it
    for key in boxes:
        boxes[key] = boxes[key]._replace(polls=polls)
