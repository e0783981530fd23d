"""Exact running statistics over the training data, once training is over."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.reducer import Reducer, exchanges_on_cpu, select_reducer
from syncbn.errors import InputError, ReplicaError
from syncbn.kernels.choice import select_kernels
from syncbn.layers.batch_norm import SyncBatchNorm
from syncbn.moments import Moments, merge

_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
_END = object()


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    process_group: dist.ProcessGroup | None = None,
    only: Callable[[str, nn.Module], bool] | None = None,
) -> tuple[str, ...]:
    """Replace running averages by the statistics of all batches together ("precise BN").

    Each layer gets the mean and the unbiased variance of everything that reaches it while the
    layers normalize by their batches, as in training, and the rest of the model is in eval mode.
    The moments of the batches are merged; averaging their variances would leave out how their
    means differ. Modes are restored and statistics written only at the end, so that a failure
    leaves the model as it was.

    Takes models and batches on any device. On a GPU, the host waits for the device only at the end,
    if the process group has a backend for the CPU too, or there is none.

    Communicates: before each batch one all-reduce of 3 float64, on the CPU if possible, so that
    ranks may have different numbers of them: one that has run out passes x[:0] of its last batch,
    if some layer is synchronized; what those layers send in training; and at the end one all-reduce
    of (2C + 1)·W float64 for each layer, in one vector. All ranks get bit-identical statistics.
    Every rank must call it. Where the model raises on one rank amid its synchronized layers, the
    others wait for the process group's time-out.

    Error: moments are computed and merged in float64, in the order of batches and ranks.

    Args:
        model: the model.
        batches: this rank's share of the training data.
        forward: called with the model and a batch, runs the model; None passes a tensor as it is,
            or the first element of a tuple or list, moved to the model's device.
        process_group: the replicas; None means the default group, or this process alone.
        only: called with a layer's qualified name and the layer; False leaves the layer in eval
            mode, with the statistics that it has.

    Returns:
        The names of the layers whose statistics were replaced; a layer that nothing reached, or
        that tracks none, keeps what it has. Their `num_batches_tracked` is the number of batches.

    Raises:
        InputError: a batch is of a type that needs `forward`; there is no batch, or none on one
            rank; or a layer saw a single value. On every rank, unless it is a batch's type.
        ReplicaError: iterating over the batches, or the model, failed on another rank.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BASE)
        and layer.running_mean is not None
        and (only is None or only(name, layer))
    }
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    reducer = select_reducer(process_group, device)
    control, control_device = _select_control(process_group, device)
    run = partial(_forward, device) if forward is None else forward
    seen: dict[str, Moments] = {}
    with ExitStack() as stack:
        stack.enter_context(_normalizing_by_batch(model, layers.values()))
        for name, layer in layers.items():
            stack.enter_context(_collecting(name, layer, seen))
        number = _run(model, batches, run, control, control_device, _synchronizes(model))
    totals = _merged_over_ranks(layers, seen, reducer, device)
    for name, moments in totals.items():
        if moments.count == 1:
            raise InputError(
                f"{name!r} saw a single value, whose variance is undefined; pass more data"
            )
    for name, moments in totals.items():
        layer = layers[name]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.unbiased_variance())
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(number)
    return tuple(totals)


def _select_control(
    process_group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Reducer, torch.device]:
    """Return what tells all ranks whether some have no batch any more, and the device for that.

    The CPU if the group can, so that the host does not wait for a GPU with each batch.
    """
    group = dist.group.WORLD if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup) or exchanges_on_cpu(group):
        device = torch.device("cpu")
    return select_reducer(process_group, device), device


def _synchronizes(model: nn.Module) -> bool:
    return any(isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) for module in model.modules())


@contextmanager
def _normalizing_by_batch(model: nn.Module, layers: Iterable[Any]) -> Generator[None]:
    chosen = list(layers)
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in chosen]
    try:
        model.eval()
        for layer in chosen:
            layer.train()
            layer.track_running_stats = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, tracks in tracking:
            layer.track_running_stats = tracks


@contextmanager
def _collecting(name: str, layer: nn.Module, seen: dict[str, Moments]) -> Generator[None]:
    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments = select_kernels(inputs[0]).local_moments(inputs[0])
        seen[name] = merge(seen[name], moments) if name in seen else moments

    handle = layer.register_forward_pre_hook(collect)
    try:
        yield
    finally:
        handle.remove()


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
    reducer: Reducer,
    device: torch.device,
    synchronizes: bool,
) -> int:
    """Run the model on the batches of all ranks in step; return how often any rank had one."""
    number = 0
    failure: BaseException | None = None
    batch = last = _END
    iterator: Iterator[Any] | None = None
    while True:
        if failure is None:
            try:
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator, _END)
            except BaseException as error:  # whatever it is, the others must not wait
                failure = error
        has = failure is None and batch is not _END
        never = not has and last is _END
        mine = torch.tensor([has, never, failure is not None], dtype=torch.float64, device=device)
        having, without, failing = reducer.sum(mine).tolist()
        if failure is not None:
            raise failure
        if failing:
            raise ReplicaError(
                f"the batches or the model failed on {failing:g} other ranks, see there; no "
                "statistics have been changed"
            )
        if having == 0 or (synchronizes and without > 0):
            if number == 0:
                raise InputError(
                    f"{without:g} of {reducer.world_size} ranks have no batch at all; give every "
                    "rank at least one"
                )
            return number
        if has:
            last = batch
        elif synchronizes:
            batch = _emptied(last)
        if has or synchronizes:
            try:
                forward(model, batch)
            except BaseException as error:  # told to the others before the next batch
                failure = error
        number += 1


def _forward(device: torch.device, model: nn.Module, batch: Any) -> object:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise InputError(
            f"a batch is a {type(batch).__name__} whose input is not evident; pass "
            "forward=lambda model, batch: model(...)"
        )
    return model(first.to(device=device))


def _emptied(batch: Any) -> Any:
    """Return a batch of no samples like this one."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_emptied(value) for value in batch]
    return batch


def _merged_over_ranks(
    layers: dict[str, Any], seen: dict[str, Moments], reducer: Reducer, device: torch.device
) -> dict[str, Moments]:
    """Return each reached layer's moments over all ranks, merged in the order of ranks."""
    if not layers:
        return {}
    widths = [2 * layer.num_features + 1 for layer in layers.values()]
    mine = [
        seen[name].packed.to(device)
        if name in seen
        else torch.zeros(width, dtype=torch.float64, device=device)
        for name, width in zip(layers, widths, strict=True)
    ]
    # Each rank fills its own row, so that the sum is all ranks' rows, exactly.
    table = torch.zeros(reducer.world_size, sum(widths), dtype=torch.float64, device=device)
    table[reducer.rank] = torch.cat(mine)
    columns = reducer.sum(table).split(widths, dim=1)
    totals: dict[str, Moments] = {}
    for name, of_ranks in zip(layers, columns, strict=True):
        total = Moments(of_ranks[0])
        for row in of_ranks[1:]:
            total = merge(total, Moments(row))
        if total.count > 0:
            totals[name] = total
    return totals
