"""Telling all ranks of a group some small numbers of each."""

import torch
import torch.distributed as dist


def all_gather(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Return every rank's numbers, by rank; communicates one all-gather of so many int64.

    Args:
        numbers: of this rank; every rank has as many.
        group: whose ranks can exchange CPU memory.
    """
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [theirs.tolist() for theirs in everyone]
