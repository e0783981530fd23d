"""From one replica's moments and sums to those of all replicas: sent, checked, remembered."""

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.diagnose import require_agreement
from syncbn.comm.reducer import Reducer, select_reducer
from syncbn.errors import InputError, ReplicaError
from syncbn.moments import (
    COUNT_LIMIT,
    Moments,
    add_fingerprint,
    checked_count,
    from_summable,
    to_summable,
)

DEBUG_VARIABLE = "SYNCBN_DEBUG_TIMEOUT_S"
# How long to wait for the other ranks' account of what they are doing, once something is wrong.
_ACCOUNT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Statistics:
    """What a backward pass needs of the whole batch, where the host knows the count.

    Attributes:
        count: values per channel.
        mean_invstd: shape (2C,), float64: the means, and 1/√(σ² + eps).
    """

    count: float
    mean_invstd: Tensor


@dataclass(eq=False)
class Reduction:
    """One forward's reduction.

    Attributes:
        local: what this replica put in, or a digest of it.
        result: what came out.
    """

    local: Moments | int
    result: Moments | Statistics


class Memory:
    """What one layer remembers from call to call: its shift, and the reductions still in use.

    Attributes:
        shift: K, shape (C,), float64: the mean of the latest batch, near which sums cancel least.
            The same on every rank, because it came out of an all-reduce.
        layer: whose memory this is, to name it in errors; None for none.
    """

    def __init__(self, channels: int, device: torch.device, layer: nn.Module | None = None) -> None:
        self.shift = torch.zeros(channels, dtype=torch.float64, device=device)
        self.layer = None if layer is None else weakref.ref(layer)
        self._name: str | None = None
        self._reductions: weakref.WeakSet[Reduction] = weakref.WeakSet()

    def name(self) -> str | None:
        """Return the layer's qualified name, looked up once; None where there is no layer."""
        layer = None if self.layer is None else self.layer()
        if layer is not None and self._name is None:
            self._name = qualified_name(layer)
        return self._name

    def move(self, device: torch.device) -> None:
        """Take the shift to another device; from the meta device, which has no values, to 0."""
        if self.shift.is_meta:
            self.shift = torch.zeros_like(self.shift, device=device)
        self.shift = self.shift.to(device)

    def shift_for(self, channels: int, device: torch.device) -> Tensor:
        """Return the shift for a batch of so many channels on a device."""
        if self.shift.shape[0] != channels or self.shift.device != device:
            self.shift = torch.zeros(channels, dtype=torch.float64, device=device)
        return self.shift

    def keep(self, reduction: Reduction) -> None:
        """Remember a reduction for as long as someone else, its backward pass, holds it."""
        self._reductions.add(reduction)

    def recall(self, local: Moments | int) -> Reduction | None:
        """Return the kept reduction that began with the same local moments, or digest of them.

        Such a forward inside a backward pass is a repetition: activation checkpointing recomputes
        what it did not store. Comparing makes the host wait for the device, then only.
        """
        if torch._C._current_graph_task_id() == -1:  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- as in torch.utils.checkpoint
            return None  # not in a backward pass; within one, it is most likely a repetition
        return next((kept for kept in self._reductions if _same(kept.local, local)), None)


def _same(a: Moments | int, b: Moments | int) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    pairs = (a.count, b.count), (a.mean, b.mean), (a.m2, b.m2)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@dataclass
class Call:
    """One layer's call: who takes part, who remembers, and how to name it.

    Attributes:
        reducer: sums over the replicas.
        memory: of the layer; None for a function call.
        channels: C.
        dtype: of the input.
        reduction: what was found for this call, alive as long as the call.
        replayed: whether that is an earlier call's, found by `Memory.recall`.
        moments: of the whole batch, where the function has no other way to return them.
    """

    reducer: Reducer
    memory: Memory | None
    channels: int
    dtype: torch.dtype
    reduction: Reduction | None = None
    replayed: bool = False
    moments: Moments | None = None

    def take_moments(self) -> Moments | None:
        """Return the moments, and forget them: the backward pass holds the call, and not them."""
        moments, self.moments = self.moments, None
        return moments

    def position(self, direction: str) -> str:
        """Return what the calling rank is doing, as in "is at the forward of 'bn1' (...)"."""
        name = None if self.memory is None else self.memory.name()
        name = "sync_batch_norm()" if name is None else repr(name)
        kind = str(self.dtype).removeprefix("torch.")
        return f"is at the {direction} of {name} ({self.channels} channels, {kind})"


def global_moments(local: Moments, call: Call) -> Moments:
    """Return the moments of all replicas' batches together, bit-identical on all of them.

    Communicates: one all-reduce of 2C + 1 float64; none in a world of one, nor when activation
    checkpointing repeats a forward.

    Raises:
        InputError: all replicas together hold a single value per channel.
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    return remembered(local, call, partial(_reduced, local, call))


def remembered(local: Moments, call: Call, reduce: Callable[[Tensor | None], Moments]) -> Moments:
    """Return what the call's memory has of a reduction, or make it, and remember it.

    Args:
        local: this replica's moments, by which a repetition is known.
        call: whose memory to look in; without one, there is nothing to repeat, and no shift.
        reduce: called with the shift, None for 0; returns the moments of all replicas together.
    """
    memory = call.memory
    compiling = torch.compiler.is_compiling()
    if memory is None:
        return reduce(None)
    if not compiling:
        earlier = memory.recall(local)
        if earlier is not None and isinstance(earlier.result, Moments):
            call.reduction, call.replayed = earlier, True
            return earlier.result
    if call.reducer.world_size == 1:
        moments = reduce(None)
    else:
        shift = memory.shift_for(local.mean.shape[0], local.mean.device)
        moments = reduce(shift)
        usable = (moments.count > 0) & moments.mean.isfinite()
        shift.copy_(torch.where(usable, moments.mean, shift))
    if not compiling:
        call.reduction = Reduction(local, moments)
        memory.keep(call.reduction)
    return moments


def _reduced(local: Moments, call: Call, shift: Tensor | None) -> Moments:
    if call.reducer.world_size == 1:
        return local
    if torch.compiler.is_compiling():
        tensors = local.count, local.mean, local.m2, shift
        return Moments(*torch.ops.syncbn.global_moments(*tensors, group_name(call.reducer)))
    return _summed(local, call, shift)


def _summed(local: Moments, call: Call, shift: Tensor | None) -> Moments:
    reducer = call.reducer
    vector = add_fingerprint(to_summable(local, shift), shift, reducer.rank, reducer.world_size)
    total = checked_sum(sum_forward(vector, call), call)
    if total is not None:
        return from_summable(total, shift)
    # One rank reloaded its layer, say. The sum about 0 is as right, if less exact, and all ranks
    # remember the same mean afterwards.
    return from_summable(sum_forward(to_summable(local), call))


def sum_forward(vector: Tensor, call: Call) -> Tensor:
    """Return the sum of all replicas' vectors for the forward pass; bit-identical on all.

    Communicates: one all-reduce of the vector.

    Raises:
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    return _sum(vector, call, "forward")


def checked_sum(total: Tensor, call: Call) -> Tensor | None:
    """Return a sum of vectors with fingerprints, or None where all is well but for these.

    Then the replicas made the same call, about different shifts. On other devices than the CPU,
    where looking would make the host wait, the count becomes NaN instead; see `checked_count`.

    Communicates: nothing, or what `require_same_call` does.

    Raises:
        ReplicaError: the replicas did not make the same call.
    """
    if total.device.type != "cpu":
        return checked_count(total)
    if 0 <= total[0].item() < COUNT_LIMIT:
        return total
    require_same_call(call)
    return None


def require_same_call(call: Call) -> None:
    """Raise, on every rank, where the replicas did not make the same call.

    For a sum whose count is none: the vectors were not made for the same one. All replicas see
    that, and all come here. Communicates: one exchange of texts over the group.

    Raises:
        ReplicaError: the calls differ, or cannot be told apart.
    """
    reducer = call.reducer
    _require_agreement(call, call.position("forward"))
    if call.memory is None:
        raise ReplicaError(
            f"rank {reducer.rank} {call.position('forward')} in compiled code, where the ranks sum "
            "about different shifts: they call different layers, or one rank alone reloaded its "
            "layer; run once without torch.compile, which names the layer"
        )


def global_sum(vector: Tensor, call: Call, direction: str = "backward") -> Tensor:
    """Return the sum of all replicas' vectors; bit-identical on all.

    The direction, forward or backward, is for errors.

    Communicates: one all-reduce of the vector; none in a world of one.

    Raises:
        ReplicaError: the replicas did not make the same call, or one is gone.
    """
    if call.reducer.world_size == 1:
        return vector
    if torch.compiler.is_compiling():
        return torch.ops.syncbn.global_sum(vector, group_name(call.reducer))
    return _sum(vector, call, direction)


def refuse(call: Call, device: torch.device, reason: str, size: int | None = None) -> None:
    """Let the other replicas know that this one refuses its input, so that they need not wait.

    The size is that of the vector which the forward sums, whose first number is the count; None
    for that of moments, 2C + 1.

    Communicates: takes part in the forward's all-reduce, with a count that is none; the others
    raise a ReplicaError with the reason.
    """
    if call.reducer.world_size == 1 or torch.compiler.is_compiling():
        return
    if _debug_timeout_s() is None:
        nothing = torch.full((size or 2 * call.channels + 1,), torch.nan, dtype=torch.float64)
        call.reducer.sum(nothing.to(device))
        if device.type != "cpu":
            return
    with suppress(ReplicaError):  # as expected; the caller raises what is wrong here
        _require_agreement(call, f"{call.position('forward')} and refuses its input: {reason}")


def _sum(vector: Tensor, call: Call, direction: str) -> Tensor:
    if _debug_timeout_s() is not None:
        _require_agreement(call, call.position(direction))
    try:
        return call.reducer.sum(vector)
    except RuntimeError as error:
        raise ReplicaError(
            f"rank {call.reducer.rank} {call.position(direction)} and got no sum over the "
            f"{call.reducer.world_size} ranks: {error}. A rank died, or did not call this layer; "
            f"{DEBUG_VARIABLE}=60 in the environment makes every call say which"
        ) from error


def _require_agreement(call: Call, position: str) -> None:
    assert call.reducer.group is not None  # a replica alone has nobody to disagree with
    require_agreement(call.reducer.group, position, _debug_timeout_s() or _ACCOUNT_TIMEOUT_S)


def _debug_timeout_s() -> float | None:
    setting = os.environ.get(DEBUG_VARIABLE)
    if not setting:
        return None
    try:
        timeout_s = float(setting)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < float("inf"):
        raise InputError(
            f"{DEBUG_VARIABLE} is {setting!r}; set it to a positive number of seconds, such as 60, "
            "or unset it"
        )
    return timeout_s


def require_two_values(count: Tensor, local_count: int, call: Call) -> None:
    """Raise, on every rank, where all replicas together hold one value per channel.

    Looking at the count makes the host wait for a GPU, so a replica that has two values itself does
    not look. In compiled code `syncbn::global_moments` looks.

    Raises:
        InputError: the count is 1.
    """
    if call.reducer.world_size == 1:
        single = local_count == 1
    elif torch.compiler.is_compiling() or local_count > 1:
        single = False
    elif count.is_cuda and torch.cuda.is_current_stream_capturing():
        single = False  # looking is impossible while a CUDA graph is captured
    else:
        single = bool(count == 1)
    if single:
        raise single_value()


def single_value() -> InputError:
    """Return the error for a whole batch of one value per channel."""
    return InputError(
        "expected more than 1 value per channel over all replicas when training, got 1, whose "
        "variance is undefined; use a larger batch, or eval mode"
    )


def qualified_name(layer: nn.Module) -> str:
    """Return a layer's name within the outermost module that holds it, or its class's name.

    For error messages: looks through all objects of the process, and does not communicate.
    """
    holders: dict[int, tuple[nn.Module, str]] = {}
    # By type(), for isinstance() asks each object for its class, and some answer with a warning.
    for module in [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]:
        for name, child in module.__dict__.get("_modules", {}).items():
            if child is not None:
                holders.setdefault(id(child), (module, name))
    path: list[str] = []
    module = layer
    while id(module) in holders and len(path) < 100:  # should modules hold each other in a circle
        module, name = holders[id(module)]
        path.insert(0, name)
    return ".".join(path) or type(layer).__name__


def group_name(reducer: Reducer) -> str:
    """Return the name by which a graph holds the process group of several replicas."""
    assert reducer.group is not None  # a replica alone has nothing to sum
    return reducer.group.group_name


# What torch.compile puts into its graphs, where it may not look into the communication. The calls
# have no layer's name there.
@torch.library.custom_op("syncbn::global_moments", mutates_args=())
def _global_moments(
    count: Tensor, mean: Tensor, m2: Tensor, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    # Gives moments and not the sum, from which the compiler would compute them a second time in
    # the backward pass, with the shift that the forward has overwritten by then.
    moments = _summed(Moments(count, mean, m2), compiled_call(mean, group_name), shift)
    if moments.count.device.type == "cpu" and moments.count == 1:
        raise single_value()
    return moments.count.clone(), moments.mean, moments.m2


@_global_moments.register_fake
def _(
    count: Tensor, mean: Tensor, m2: Tensor, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(count), torch.empty_like(mean), torch.empty_like(m2)


@torch.library.custom_op("syncbn::global_sum", mutates_args=())
def _global_sum(vector: Tensor, group_name: str) -> Tensor:
    return _sum(vector, compiled_call(vector[::2], group_name), "backward")


@_global_sum.register_fake
def _(vector: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(vector)


def compiled_call(per_channel: Tensor, group_name: str) -> Call:
    """Return the call that compiled code makes, which knows neither layer nor memory.

    Args:
        per_channel: as long as there are channels.
        group_name: of the process group.
    """
    resolve: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- a graph holds a group by its name
    group: dist.ProcessGroup = resolve(group_name)
    return Call(
        select_reducer(group, per_channel.device), None, per_channel.numel(), per_channel.dtype
    )
