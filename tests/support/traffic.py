"""What goes through `torch.distributed` while a test listens."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


@contextmanager
def recorded_all_reduces() -> Generator[list[Tensor]]:
    """Collect the tensors that this rank adds up with the others."""
    sent: list[Tensor] = []
    all_reduce = dist.all_reduce

    def record(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor)
        return all_reduce(tensor, *args, **options)

    with mock.patch.object(dist, "all_reduce", record):
        yield sent
