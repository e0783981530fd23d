"""What a rank adds up with the others while a test listens."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from syncbn.comm.reducer import ProcessGroupReducer, SharedMemoryReducer


@contextmanager
def recorded_all_reduces() -> Generator[list[Tensor]]:
    """Collect the tensors that this rank adds up with the others, whoever does it."""
    sent: list[Tensor] = []

    def recording(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def sum_(self: Any, vector: Tensor, overwrite: bool = False) -> Tensor:
            sent.append(vector.clone())
            return method(self, vector, overwrite)

        return sum_

    with ExitStack() as stack:
        for reducer in (ProcessGroupReducer, SharedMemoryReducer):
            stack.enter_context(mock.patch.object(reducer, "sum", recording(reducer.sum)))
        yield sent
