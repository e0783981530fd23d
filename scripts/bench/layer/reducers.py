"""Sums over the ranks by themselves, and a small layer as the world grows."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from scripts.bench.layer.step import training_step
from scripts.bench.measure import Rows, progress, take_turns
from syncbn.comm.reducer import Reducer, select_reducer

CHANNELS = [64, 512, 2048]
REDUCERS = {"shared memory": "shared_memory", "gloo": "process_group"}


def bench_reducers(turns: int) -> Rows:
    """One sum of a vector after the other, through shared memory and through gloo."""
    rows: Rows = []
    for channels in CHANNELS:
        vector = torch.randn(2 * channels + 1, dtype=torch.float64)
        shared_s, group_s = take_turns(_sums(vector), turns).values()
        row = {
            "W": dist.get_world_size(),
            "values": len(vector),
            "shared memory µs": shared_s * 1e6,
        }
        rows.append(row | {"gloo µs": group_s * 1e6, "ratio": group_s / shared_s})
        progress(rows[-1])
    return rows


def _sums(vector: Tensor) -> dict[str, Callable[[], Any]]:
    def summing(choice: str) -> Callable[[], Tensor]:
        reducer = select_reducer(None, vector.device, choice)
        return lambda: reducer.sum(vector)

    return {f"sum, {name}": summing(choice) for name, choice in REDUCERS.items()}


def bench_growth(turns: int) -> Rows:
    """A small layer, its sum alone, and an all-gather in the sum's place, as the world grows."""
    rows: Rows = []
    world_size = dist.get_world_size()
    # Where ranks outnumber cores, a sum takes the longer the more there are.
    turns = max(1, 2 * turns // max(2, world_size))
    for channels in CHANNELS:
        x, dy = (torch.randn(4, channels, 4, 4) for _ in range(2))
        x.requires_grad_()
        steps = {
            f"layer, {name}": training_step(syncbn.SyncBatchNorm(channels, reducer=choice), x, dy)
            for name, choice in REDUCERS.items()
        }
        vector = torch.randn(2 * channels + 1, dtype=torch.float64)
        gathered = vector.new_empty(world_size, len(vector))

        def gather(vector: Tensor = vector, gathered: Tensor = gathered) -> Tensor:
            dist.all_gather(list(gathered.unbind()), vector)
            return gathered.sum(0)

        gloo = select_reducer(None, x.device, REDUCERS["gloo"])
        row = {"W": world_size, "C": channels, "sent B": _bytes_sent(steps["layer, gloo"], gloo)}
        taken = take_turns({**steps, **_sums(vector), "all-gather": gather}, turns)
        row |= {f"{name} µs": time_s * 1e6 for name, time_s in taken.items()}
        rows.append(row | {"gathered B": gathered.nbytes})
        progress(rows[-1])
    return rows


def _bytes_sent(step: Callable[[], None], reducer: Reducer) -> int:
    """Return how many bytes a step gives to its reducer, which is of the same class as this one."""
    cls = type(reducer)
    with mock.patch.object(cls, "sum", autospec=True, side_effect=cls.sum) as add_up:
        step()
    return sum(call.args[1].nbytes for call in add_up.call_args_list)
