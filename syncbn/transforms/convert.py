"""Turning a model's batch normalization into `SyncBatchNorm`, and back."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.errors import ConversionError, ConversionWarning
from syncbn.layers.base import Synchronized, adopt, check_reducer
from syncbn.layers.batch_norm import BatchNorm, SyncBatchNorm
from syncbn.layers.converted import exchange, has_timms_forward, own_class, synchronized

_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
_FORWARDS = (_BASE.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, BatchNorm.forward)


def convert_sync_batchnorm(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    only: Callable[[str, nn.Module], bool] | None = None,
    reducer: str | None = None,
) -> nn.Module:
    """Turn every batch normalization of a model into a `SyncBatchNorm`, in place.

    Converts BatchNorm1d, 2d and 3d, their lazy forms, `torch.nn.SyncBatchNorm`, and timm's
    BatchNormAct2d and SyncBatchNormAct with their activation; also subclasses that leave `forward`
    alone or call `super().forward(...)` in theirs. The modules stay the same objects and change
    class, so that parameters, buffers, hooks, attributes, modes, parametrizations, and whatever
    else refers to them stay valid. A layer that is synchronized already keeps its process group
    unless one is given. Does not communicate.

    The new class is a subclass of the old one, which other tools look for: a BatchNorm2d becomes a
    `SyncBatchNorm2d`. `torch.nn.SyncBatchNorm` becomes that as well, because
    DistributedDataParallel refuses torch's class on the CPU, and with it its other subclasses.
    Inputs may have any number of dimensions, as for torch's converted layers.

    Warns of layers that keep running statistics but are no subclass of torch's batch
    normalization: they stay as they are, and may normalize by the batch of one replica.

    Args:
        model: the model, or a batch normalization itself.
        process_group: the replicas to synchronize with; None means the default group.
        only: called with a layer's qualified name and the layer; False leaves it as it is.
        reducer: who sums over the replicas, as for `SyncBatchNorm`; None leaves it as it is.

    Returns:
        The model.

    Raises:
        InputError: there is no such reducer. Nothing has been changed then.
        ConversionError: a layer's class has a `forward` of its own that converting would drop.
            Nothing has been changed then.
    """
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BASE) and (only is None or only(name, module))
    ]
    for name, module in chosen:
        if not isinstance(module, SyncBatchNorm):
            _check_forward(name, module)
    check_reducer(reducer)
    for _, module in chosen:
        if not isinstance(module, SyncBatchNorm):
            kind = type(module)
            own = own_class(kind)
            module.__dict__.setdefault("process_group", None)
            module.__dict__["_reverts_to"] = own
            module.__class__ = exchange(kind, own, synchronized(own))  # pyright: ignore[reportAttributeAccessIssue] -- has the same layout
            assert isinstance(module, SyncBatchNorm)
            adopt(module)
        if process_group is not None:
            module.__dict__["process_group"] = process_group
        if reducer is not None:
            module.__dict__["reducer"] = reducer
    _warn_of_local_layers(model)
    return model


def revert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Undo `convert_sync_batchnorm`, in place: every layer gets the class back that it had.

    A layer that was built as a `SyncBatchNorm`, or fused with what follows it, becomes a
    `BatchNorm`, which computes on each replica's own batch. Parameters, buffers, hooks and modes
    stay. Does not communicate.

    Args:
        model: the model, or a layer itself.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            kind = type(module)
            original: type[nn.Module] = module.__dict__.pop("_reverts_to", BatchNorm)
            module.__dict__.pop("reducer", None)
            if issubclass(original, LazyModuleMixin) and not isinstance(module, LazyModuleMixin):
                original = original.cls_to_become  # pyright: ignore[reportAssignmentType] -- it has seen a batch; torch types this as any class
            if not issubclass(original, nn.SyncBatchNorm):
                del module.__dict__["process_group"]
            del module.__dict__["_memory"]
            module.__class__ = exchange(kind, own_class(kind), original)  # pyright: ignore[reportAttributeAccessIssue] -- has the same layout
    return model


def _check_forward(name: str, module: nn.Module) -> None:
    """Raise if a layer, once converted, would not normalize with ours all the same."""
    kind = own_class(type(module))
    become: Any = kind.cls_to_become if issubclass(kind, LazyModuleMixin) else kind
    for each in (kind, become):
        if "forward" in vars(module) or not _leaves_normalizing(each):
            raise ConversionError(
                f"cannot convert {name!r}: {each.__name__} has a forward of its own that does not "
                "call super().forward(), and converting would drop what it does; leave the layer "
                "out with only=…, or replace it yourself"
            )


def _leaves_normalizing(kind: Any) -> bool:
    """Return whether every forward of a class, down to torch's or ours, calls the next one."""
    if has_timms_forward(kind):
        return True
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        if forward in _FORWARDS:
            return True
        if forward is not None and not _delegates(forward):
            return False
    return False


def _delegates(forward: Any) -> bool:
    """Return whether a method leaves the normalizing to its superclass."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return (
        code is not None
        and "super" in code.co_names
        and "forward" in code.co_names
        and "batch_norm" not in code.co_names
    )


def _warn_of_local_layers(model: nn.Module) -> None:
    local = [
        f"{name!r}, a {type(module).__name__}"
        for name, module in model.named_modules()
        if _keeps_statistics(module)
    ]
    if local:
        warnings.warn(
            "these layers keep running statistics, but are no subclass of torch's batch "
            f"normalization: {'; '.join(local)}. They are not converted: where they normalize by "
            "their batch, it is that of one replica",
            ConversionWarning,
            stacklevel=3,
        )


def _keeps_statistics(module: nn.Module) -> bool:
    """Return whether a layer that is not converted looks like batch normalization."""
    buffers = module._buffers  # pyright: ignore[reportPrivateUsage] -- of which None, without tracking, is told by nothing public
    if isinstance(module, (_BASE, _InstanceNorm, Synchronized)):
        return False  # converted or left out by choice; of one sample each; synchronized
    # Frozen batch normalization has its weight for a buffer.
    return bool({"running_mean", "running_var"} & set(buffers)) and "weight" not in buffers
