"""The classes that converted layers have, and how they are found again for a class."""

import copy
import functools
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.layers.batch_norm import BatchNorm, SyncBatchNorm

# Whose classes are put around a layer's own one, by changing the class of the layer.
_WRAPPERS = "torch.nn.utils.parametrize", "torch.distributed."
_MADE_BY_TYPE = "__dict__", "__weakref__"


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """A `SyncBatchNorm` that is an `nn.BatchNorm1d` too, for whoever looks for one.

    Takes inputs (N, C, *) with any number of dimensions, as torch's SyncBatchNorm does.
    """


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """A `SyncBatchNorm` that is an `nn.BatchNorm2d` too, for whoever looks for one.

    Takes inputs (N, C, *) with any number of dimensions, as torch's SyncBatchNorm does. That one
    becomes this class too, for two reasons. DistributedDataParallel refuses what is an
    `nn.SyncBatchNorm` on the CPU. And tools that treat torch's layer in some way treat an
    `nn.BatchNorm2d` alike, except those which replace it because it cannot run on the CPU.
    """


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """A `SyncBatchNorm` that is an `nn.BatchNorm3d` too, for whoever looks for one.

    Takes inputs (N, C, *) with any number of dimensions, as torch's SyncBatchNorm does.
    """


# Those that compute what `SyncBatchNorm` does, and nothing else.
PLAIN = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)

_PLAIN: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm2d,
    BatchNorm: SyncBatchNorm,
}
_LAZY: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.LazyBatchNorm1d: SyncBatchNorm1d,
    nn.LazyBatchNorm2d: SyncBatchNorm2d,
    nn.LazyBatchNorm3d: SyncBatchNorm3d,
}


def synchronized(kind: type[nn.Module]) -> type[SyncBatchNorm]:
    """Return the class that layers of a class of batch normalization become.

    It is the same one each time, and a subclass of the layer's, but for torch's SyncBatchNorm
    and timm's on top of it.

    Args:
        kind: the class, whose forward is torch's, or timm's with an activation, or leaves the
            normalizing to its superclass.
    """
    if kind in _PLAIN:
        return _PLAIN[kind]
    if issubclass(kind, SyncBatchNorm):
        return kind
    if _is_of_timm(kind, "SyncBatchNormAct"):
        # timm treats both alike, and DistributedDataParallel takes only this one on the CPU.
        return synchronized(sys.modules[kind.__module__].BatchNormAct2d)
    for made in kind.__subclasses__():
        if vars(made).get("_made_for") is kind:
            return made  # pyright: ignore[reportReturnType] -- made below
    attributes: dict[str, Any] = {
        "__module__": __name__,
        "_made_for": kind,
        "__reduce_ex__": _reduce,
    }
    if issubclass(kind, LazyModuleMixin):
        become: Any = kind.cls_to_become
        attributes["cls_to_become"] = synchronized(become)
    if has_timms_forward(kind):
        attributes["forward"] = _forward_with_activation
    # The layer's own class first: all that it overrides stays in force, and its super() is ours.
    return type(f"Sync{kind.__name__}", (kind, _base_for(kind)), attributes)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a layer's class without what parametrizations and `fully_shard` put around it."""
    return next(each for each in kind.__mro__ if not each.__module__.startswith(_WRAPPERS))


def exchange(kind: Any, old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return a class like a layer's, with another one in the place of its `own_class`.

    To exchange back gives the class of before, unless another parametrization was added.
    """
    if kind is old:
        return new
    before = vars(kind).get("_exchanged_for")
    if before is not None and own_class(before) is new and _properties(before) == _properties(kind):
        return before
    bases = [exchange(each, old, new) if issubclass(each, old) else each for each in kind.__bases__]
    attributes = {name: value for name, value in vars(kind).items() if name not in _MADE_BY_TYPE}
    if kind.__module__ == parametrize.__name__:
        # Parametrizing gives a class this method, as far as it has none.
        attributes.pop("__deepcopy__", None)
        if not hasattr(new, "__deepcopy__"):
            attributes["__deepcopy__"] = _deepcopy
    return type(kind.__name__, tuple(bases), attributes | {"_exchanged_for": kind})


def _properties(kind: type) -> set[str]:
    """Return the names of the tensors that a class of torch's computes from others."""
    return {name for name, value in vars(kind).items() if isinstance(value, property)}


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    twin = self.__class__.__new__(self.__class__)
    memo[id(self)] = twin
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


def has_timms_forward(kind: Any) -> bool:
    """Return whether a class's forward is that of timm's BatchNormAct2d."""
    return any(
        _is_of_timm(each, "BatchNormAct2d") and kind.forward is each.forward
        for each in kind.__mro__
    )


def _is_of_timm(kind: type, name: str) -> bool:
    return kind.__name__ == name and kind.__module__.startswith("timm.")


def _base_for(kind: type[nn.Module]) -> type[SyncBatchNorm]:
    """Return what comes after a class, and before whatever that class normalizes with."""
    for theirs in (nn.SyncBatchNorm, BatchNorm):
        if issubclass(kind, theirs):
            return _in_front_of(theirs)
    found = (ours for theirs, ours in (_PLAIN | _LAZY).items() if issubclass(kind, theirs))
    return next(found, SyncBatchNorm)


@functools.cache
def _in_front_of(theirs: type[nn.Module]) -> type[SyncBatchNorm]:
    """Return a class that puts ours before one with a forward, in the order of resolution."""
    return type(f"Sync{theirs.__name__}", (SyncBatchNorm, theirs), {})


def _reduce(self: Any, protocol: Any) -> Any:
    """Say how to unpickle a layer of a class that no module has a name for."""
    kind = vars(type(self)).get("_made_for")
    if kind is None:  # a subclass of one
        return object.__reduce_ex__(self, protocol)
    return _blank, (kind,), self.__getstate__()


def _blank(kind: type[nn.Module]) -> SyncBatchNorm:
    """Return a layer without a state, of the class that layers of a class become."""
    made = synchronized(kind)
    return made.__new__(made)


def _forward_with_activation(self: Any, input: Tensor) -> Tensor:
    output = SyncBatchNorm.forward(self, input)
    for name in ("drop", "act"):  # which torch's conversion of timm's layer loses
        if hasattr(self, name):
            output = getattr(self, name)(output)
    return output
