"""The kernels in Triton, interpreted on the CPU."""

import itertools
import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter


@contextmanager
def interpreting() -> Generator[None]:
    """Interpret what is decorated or launched within."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        yield


with interpreting():
    from scripts.bench.gpu.interpreted import interpreting_quickly
    from syncbn.comm import symmetric_memory
    from syncbn.comm import (
        symmetric_source as symmetric_source,
    )  # which it imports at its first use
    from syncbn.kernels import triton as kernels
    from syncbn.kernels import triton_launch as launch


@contextmanager
def tiles_of(values: int) -> Generator[kernels.TritonKernels]:
    """Use tiles of so many values, so that small tensors have several, and several parts."""
    with mock.patch.object(launch, "_TILE", values), interpreting(), interpreting_quickly():
        yield kernels.TritonKernels()


@contextmanager
def mailboxes_in(directory: Path) -> Generator[None]:
    """Let ranks open files to each other as GPUs open memory, each mapped at another address."""
    delays = random.Random(dist.get_rank())
    numbers, atomic = itertools.count(), interpreter.InterpreterBuilder.create_atomic_rmw
    files: dict[int, int] = {}

    def opened(number: int, rank: int, words: int) -> Tensor:
        path = str(directory / f"{number}-{rank}")
        return torch.from_file(path, shared=True, size=words, dtype=torch.int64)

    def allocate(words: int, device: torch.device) -> Tensor:
        number = next(numbers)
        memory = opened(number, dist.get_rank(), words).zero_()
        files[memory.data_ptr()] = number
        return memory

    def rendezvous(memory: Tensor, group: dist.ProcessGroup) -> tuple[list[int], object]:
        number, ranks = files[memory.data_ptr()], range(dist.get_world_size(group))
        everyone = [opened(number, rank, memory.numel()) for rank in ranks]
        return [theirs.data_ptr() for theirs in everyone], everyone

    def look(*args: Any) -> Any:
        # Who waits leaves the processor to the others, and who has seen a flag lets them get ahead.
        time.sleep(5e-4)
        result = atomic(*args)
        if delays.random() < 0.2:
            time.sleep(0.02)
        return result

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", look),
        mock.patch.object(symmetric_memory, "allocate", allocate),
        mock.patch.object(symmetric_memory, "rendezvous", rendezvous),
        mock.patch.multiple(symmetric_memory, _LEAST=512, _BLOCK=128),  # to take less time
        interpreting(),
        interpreting_quickly(),
    ):
        yield
