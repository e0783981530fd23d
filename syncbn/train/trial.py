"""What is tried before training: a step on zeros, and the last batch of an epoch."""

from typing import Any

import torch

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.agreement import together
from syncbn.train.data import Dataset
from syncbn.train.generators import seed_generators
from syncbn.train.model_checks import check_used
from syncbn.train.run.checkpoint import Position
from syncbn.train.run.reasons import OUT_OF_MEMORY
from syncbn.train.schema import SYNCHRONIZED
from syncbn.train.setup import Training
from syncbn.train.tasks.checks import check_task, check_without_samples, tensors


def try_out(training: Training, dataset: Dataset, last_batch: list[int], rank: int) -> None:
    """Make a step on zeros, and the forward of an epoch's last batch, and take both back.

    Collective: what DDP and the layers send. The generators begin anew afterwards.

    Args:
        training: what is to be trained.
        dataset: the data.
        last_batch: how many samples each rank has in an epoch's last batch.
        rank: this rank.

    Raises:
        ConfigError: the model does not fit the task or the memory, a parameter is not used, or the
            last batch is too small for the model.
    """
    buffers = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
    # Together, as the others would wait in the next forward pass for a rank that failed alone.
    together(lambda: _settle(training, dataset, may_be_empty=0 in last_batch))
    shifts = {name: shift.clone() for name, shift in training.shifts().items()}
    if set(last_batch) != {training.config.data.batch_size}:
        _try_last_batch(training, dataset, last_batch, rank)
    with torch.no_grad():
        for name, buffer in training.model.named_buffers():
            buffer.copy_(buffers[name])
        for name, shift in training.shifts().items():
            shift.copy_(shifts[name])
    seed_generators(training.config.seed, Position())


def _try_last_batch(training: Training, dataset: Dataset, last_batch: list[int], rank: int) -> None:
    """Raise if a layer cannot learn from the last batch, such as from a single value a channel."""
    size = last_batch[rank]
    if size == 0 and not isinstance(training.config.norm, SYNCHRONIZED):
        return  # is in evaluation mode then
    generator = torch.Generator().manual_seed(rank)
    samples = torch.rand(size, *dataset.input.shape, generator=generator)
    try:
        with torch.no_grad(), training.autocast():
            training.model(training.inputs(samples))
    except (RuntimeError, ValueError, SyncBNError) as error:
        total = sum(last_batch)
        raise ConfigError(
            f"the last batch of each epoch has {total} of {len(dataset.train)} samples over all "
            f"{len(last_batch)} ranks, and the model cannot learn from so few: "
            f"{str(error).splitlines()[0]}; set data.drop_last=true, or another data.batch_size "
            f"than {training.config.data.batch_size}"
        ) from error


def _settle(training: Training, dataset: Dataset, may_be_empty: bool) -> None:
    """Make one step on zeros and take it back, after which DDP's buckets stay as they are.

    DDP arranges its buckets anew after its first backward pass, and with more than two ranks the
    arrangement decides in which order gradients are added up. Without this, the first step of a
    resumed run would round differently from the same step of a run that was not stopped.
    """
    size = training.config.data.batch_size
    samples = torch.zeros(size, *dataset.input.shape)
    try:
        with training.autocast():
            output: Any = training.replica(training.inputs(samples))
        training.task.check_output(output, size)
        nothing = [part.float().sum() * 0 for part in tensors(output)]
        torch.stack(nothing).sum().backward()
        _, first = dataset.train.__getitems__([(0, 0)])
        check_task(training.task, output, first[[0] * size], training.device)
        if may_be_empty:
            check_without_samples(training.task, output, first, training.device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"data.batch_size={size} is too much for the memory of {training.device}: "
            f"{str(error).splitlines()[0]}; choose a smaller one, with more of "
            f"optim.accumulate={training.config.optim.accumulate} for the same step, or "
            "numerics.precision=bfloat16"
        ).because(OUT_OF_MEMORY) from error
    except SyncBNError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model: cannot learn from images of shape {dataset.input.shape}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_used(training.model, training.config)
    training.optimizer.zero_grad(set_to_none=True)
