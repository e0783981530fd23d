"""Turning a model's batch normalization into `SyncBatchNorm`, and back."""

import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.errors import ConversionError
from syncbn.layers.base import adopt, check_reducer
from syncbn.layers.batch_norm import BatchNorm, SyncBatchNorm

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base


def convert_sync_batchnorm(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    only: Callable[[str, nn.Module], bool] | None = None,
    reducer: str | None = None,
) -> nn.Module:
    """Turn every batch normalization of a model into a `SyncBatchNorm`, in place.

    Converts BatchNorm1d, 2d and 3d, their lazy forms, `torch.nn.SyncBatchNorm`, and timm's
    BatchNormAct2d with its activation; also subclasses that leave `forward` alone or call
    `super().forward(...)` in theirs. The modules stay the same objects and change class, so that
    parameters, buffers, hooks, attributes, modes, parametrizations, and whatever else refers to
    them stay valid. A layer that is synchronised already keeps its process group unless one is
    given. Does not communicate.

    Args:
        model: the model, or a batch normalization itself.
        process_group: the replicas to synchronise with; None means the default group.
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
    classes = [_synchronised(name, module) for name, module in chosen]
    check_reducer(reducer)
    for (_, module), synchronised in zip(chosen, classes, strict=True):
        if type(module) is not synchronised:
            module.__dict__.setdefault("process_group", None)
            module.__dict__["_reverts_to"] = type(module)
            module.__class__ = synchronised  # pyright: ignore[reportAttributeAccessIssue] -- a subclass of the batch normalization's
            assert isinstance(module, SyncBatchNorm)
            adopt(module)
        if process_group is not None:
            module.__dict__["process_group"] = process_group
        if reducer is not None:
            module.__dict__["reducer"] = reducer
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
            original: type[nn.Module] = module.__dict__.pop("_reverts_to", BatchNorm)
            module.__dict__.pop("reducer", None)
            if issubclass(original, _LAZY) and not isinstance(module, LazyModuleMixin):
                original = original.cls_to_become  # pyright: ignore[reportAssignmentType] -- it has seen a batch; torch types this as any class
            if not issubclass(original, nn.SyncBatchNorm):
                del module.__dict__["process_group"]
            del module.__dict__["_memory"]
            module.__class__ = original  # pyright: ignore[reportAttributeAccessIssue] -- the class that the module had
    return model


def _synchronised(name: str, module: nn.Module) -> type[nn.Module]:
    """Return the class that a batch normalization becomes."""
    kind = type(module)
    if kind in _PLAIN or kind is BatchNorm:
        return SyncBatchNorm
    if issubclass(kind, SyncBatchNorm):
        return kind
    attributes: dict[str, Any] = {}
    forward: Any = kind.forward
    if kind in _LAZY:
        attributes["cls_to_become"] = SyncBatchNorm
    elif forward in (_BASE.forward, nn.SyncBatchNorm.forward):
        attributes["forward"] = SyncBatchNorm.forward
    elif kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        attributes["forward"] = _forward_with_activation
    elif not _delegates(forward):
        raise ConversionError(
            f"cannot convert {name!r}: {kind.__name__} has a forward of its own that does not call "
            "super().forward(), and converting would drop what it does; leave the layer out with "
            "only=…, or replace it yourself"
        )
    # The layer's own class first: all that it overrides stays in force, and its super() is ours.
    return type(f"Sync{kind.__name__}", (kind, SyncBatchNorm), attributes)


def _delegates(forward: Any) -> bool:
    """Return whether a method leaves the normalising to its superclass."""
    code = inspect.unwrap(forward).__code__
    return (
        "super" in code.co_names
        and "forward" in code.co_names
        and "batch_norm" not in code.co_names
    )


def _forward_with_activation(self: Any, input: Tensor) -> Tensor:
    return self.act(self.drop(SyncBatchNorm.forward(self, input)))
