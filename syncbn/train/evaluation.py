"""How good a model is on held-out data, each sample counted once whatever the world size."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.reducer import Reducer
from syncbn.train.data import Batch
from syncbn.train.launch.watchdog import Watch
from syncbn.train.model_checks import on_this_rank_alone
from syncbn.train.setup import Training, buffers_of_ranks
from syncbn.train.step import mean


@dataclass(frozen=True)
class Evaluation:
    """What a model made of some samples of all ranks.

    Attributes:
        samples: how many.
        metrics: the mean loss, and the task's metrics, by name.
        rows: shape (samples, 2 + S), float64, in the order of the samples: of each its loss, its
            weight, and what the task observed. On rank 0 alone, and if asked for.
    """

    samples: int
    metrics: dict[str, float]
    rows: Tensor | None


def evaluate(
    training: Training,
    model: nn.Module,
    batches: Iterable[Batch],
    reducer: Reducer,
    watch: Watch,
    keep_rows: bool = False,
) -> Evaluation | None:
    """Return what a model makes of the batches of all ranks; None if a rank is told to stop.

    Collective: one all-reduce of 4 + S float64, one broadcast of each buffer that ranks have for
    themselves, from rank 0, whose statistics are the ones that will be served; and one gathering
    of the rows, if they are kept.

    Args:
        training: how the model computes, and its task.
        model: what is evaluated.
        batches: of this rank: every world_size-th sample, in order.
        reducer: sums over the ranks.
        watch: hears of signals.
        keep_rows: whether to keep what is known of each sample.

    Raises:
        DataError: a sample cannot be read, on this rank alone.
    """
    for buffer in buffers_of_ranks(model):
        dist.broadcast(buffer, src=0)
    task = training.task
    was_training = model.training
    model.eval()
    count = 0
    # Added up where they are computed, so that no batch makes the host wait.
    sums = torch.zeros(2 + task.statistics, dtype=torch.float64, device=training.device)
    rows: list[Tensor] = []
    with torch.inference_mode():
        for samples, targets in batches:
            if watch.stop_signal:
                break
            with training.autocast():
                output: Any = model(training.inputs(samples))
            weights = task.weights(targets).double().to(training.device, non_blocking=True)
            targets = targets.to(training.device, non_blocking=True)
            with on_this_rank_alone():
                losses = task.losses(output, targets, False).double()
            observed = task.observe(task.answer(output), targets)
            table = torch.cat([losses[:, None], weights[:, None], observed], dim=1)
            sums += table.sum(0)
            count += len(samples)
            if keep_rows:
                rows.append(table)
    model.train(was_training)
    mine = torch.tensor([watch.stop_signal, count, *sums.tolist()], dtype=torch.float64)
    stops, total, loss, weight, *statistics = reducer.sum(mine).tolist()
    if stops:
        return None
    metrics = {"loss": mean(loss, weight), **task.metrics(statistics)}
    every = _gathered(rows, int(total), len(sums)) if keep_rows else None
    return Evaluation(int(total), metrics, every)


def _gathered(rows: list[Tensor], total: int, width: int) -> Tensor | None:
    """Return the rows of all ranks in the order of the samples; on rank 0 alone."""
    mine = torch.cat(rows).cpu() if rows else torch.zeros(0, width, dtype=torch.float64)
    is_first = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(mine, parts)
    if parts is None:
        return None
    every = torch.empty(total, width, dtype=torch.float64)
    for rank, part in enumerate(parts):
        every[rank :: len(parts)] = part
    return every
