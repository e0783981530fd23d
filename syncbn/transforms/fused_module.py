"""A module whose forward runs the code of a graph in training, and its own code otherwise.

The module keeps its tensors, submodules, methods and hooks, and its class as a base class. Each
call compares the module with what the graph was made from; if anything differs, the module's own
forward runs and computes what it always did.
"""

import copy
import copyreg
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from syncbn.layers.batch_norm import SyncBatchNorm
from syncbn.layers.converted import PLAIN
from syncbn.transforms.forward_graph import LISTS, ForwardGraph
from syncbn.transforms.purity import Member
from syncbn.transforms.tracing import KeptError

_ABSENT = object()


@dataclass(frozen=True)
class Shape:
    """What a module in a fused one consists of: its type, and its children's names and types."""

    path: tuple[str, ...]
    kind: type
    names: tuple[str, ...]
    kinds: tuple[type, ...]


@dataclass(frozen=True)
class Variant:
    """A forward's code for some kinds of arguments, and when it may run.

    Attributes:
        run: the code.
        kinds: of arguments, of which all must be one.
        norms: paths of the normalizations that take something along.
        plain: paths and types of other modules that must have no hooks.
        shapes: of the modules between the fused one and those that it calls.
        attributes: paths, names and values of what the forward may read.
        tensors: paths of the parameters and buffers that it reads.
        shared: for each module or tensor with several paths that it uses, these.
    """

    run: Callable[..., Any]
    kinds: tuple[type, ...]
    norms: tuple[tuple[str, ...], ...]
    plain: tuple[tuple[tuple[str, ...], type], ...]
    shapes: tuple[Shape, ...]
    attributes: tuple[tuple[tuple[str, ...], str, Any], ...]
    tensors: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[tuple[str, ...], ...], ...]

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is still as it was when its forward was traced."""
        return (
            all(_has_shape(_at(module, shape.path), shape) for shape in self.shapes)
            and all(_is_ready(_at(module, path)) for path in self.norms)
            and all(_is_bare(_at(module, path), kind) for path, kind in self.plain)
            and all(_has(_at(module, path), name, was) for path, name, was in self.attributes)
            and all(_used(module, path) is not None for path in self.tensors)
            and all(len({id(_used(module, path)) for path in paths}) == 1 for paths in self.shared)
        )


def variant(module: nn.Module, traced: ForwardGraph, norms: list[str], bare: list[str]) -> Variant:
    """Return the code of a graph that has been changed, for the module that it was traced of.

    Args:
        module: where all fused modules in it have their new class already.
        traced: its graph, whose call of a normalization is a call of `normalized`.
        norms: the paths of the normalizations that take something along.
        bare: the paths of the modules that must have no hooks, such as those not called any more.
    """
    code = traced.graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<fused {type(module).__name__}>", "exec"), scope)  # noqa: S102 -- fx's own way from a graph to a function
    plain = [_path(path) for path in dict.fromkeys((*bare, *traced.inlined))]
    called = [
        str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")
    ]
    used = {_path(path) for path in (*called, *bare)}
    tensors = [path for path in used if isinstance(_used(module, path), Tensor)]
    return Variant(
        scope["forward"],
        traced.kinds,
        tuple(map(_path, norms)),
        tuple((path, type(_at(module, path))) for path in plain),
        tuple(_shapes(module, [*called, *bare])),
        tuple((_path(path), name, value) for path, name, value in traced.attributes),
        tuple(tensors),
        tuple(_shared(module, used)),
    )


def give_forward(module: nn.Module, variants: list[Variant]) -> None:
    """Give a module a class of its own, whose forward is the variant that fits, if one does.

    Raises:
        KeptError: its class refuses to be derived from. The module is as it was.
    """
    original = type(module)
    own_forward = original.forward
    by_kind: dict[type | None, Variant] = {kind: each for each in variants for kind in each.kinds}

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.training and original.forward is own_forward:
            chosen = by_kind.get(_kind((*args, *kwargs.values())))
            if chosen is not None and not _has_global_hooks() and chosen.fits(self):
                return chosen.run(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs)

    names = {name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")}
    members = {**names, "forward": forward, "class_before_fuse": original}
    try:
        made = types.new_class(
            original.__name__, (_Fused, original), {}, lambda scope: scope.update(members)
        )
    except Exception as error:  # whatever the class does with its subclasses
        raise KeptError(f"{original.__name__} cannot have a subclass: {error}") from error
    module.__class__ = made


class _Fused:
    """What the class of a fused module has besides its forward."""

    class_before_fuse: type

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as the class before would; the copy is fused as well."""
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        if isinstance(self, nn.Module) and parametrize.is_parametrized(
            self
        ):  # refuses to tell its state
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return twin
        return copy._reconstruct(self, memo, *super().__reduce_ex__(4))  # pyright: ignore[reportAttributeAccessIssue] -- what copy.deepcopy does with this value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the class before would: code is not pickled, so what is loaded is not fused."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        # pickle lets copyreg's function make nothing but the very class of the object.
        function = object.__new__ if reduced[0] is copyreg.__newobj__ else reduced[0]  # pyright: ignore[reportAttributeAccessIssue] -- missing in the stubs
        arguments = tuple(
            self.class_before_fuse if value is type(self) else value for value in reduced[1]
        )
        return (function, arguments, *reduced[2:])


def normalized(
    layer: SyncBatchNorm,
    input: Tensor,
    residual: Any,
    *,
    adds: bool,
    residual_first: bool,
    onto_output: bool,
    onto_residual: bool,
    relu: bool,
) -> Tensor:
    """Return what a layer, the addition and the ReLU after it compute, in one call of the layer.

    Args:
        layer: does no more than to normalize, except during this call.
        input: its input.
        residual: what is added to its output, if it `adds`.
        adds: whether there is an addition.
        residual_first: whether the residual is its first operand, whose memory format a sum takes.
        onto_output: whether the addition is one in place to the output.
        onto_residual: whether it is one in place to the residual.
        relu: whether a ReLU follows.
    """
    given: tuple[Tensor, ...] = (input,)
    if adds:
        if not _is_alike(input, residual, onto_output) or _holds_statistics(layer, residual):
            output = layer(input)
            if onto_output:
                output += residual
            elif onto_residual:
                residual += output
                output = residual
            else:
                output = residual + output if residual_first else output + residual
            return functional.relu(output) if relu else output
        given = input, residual
    if not relu:
        return layer(*given)
    # Only during this call, so that other callers of the layer get a plain normalization.
    layer.fuses_relu = True
    try:
        return layer(*given)
    finally:
        layer.fuses_relu = False


def _is_alike(input: Tensor, residual: Any, onto_output: bool) -> bool:
    """Return whether a sum has the input's shape, dtype, device and memory format."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and (onto_output or residual.stride() == input.stride())
    )


def _holds_statistics(layer: SyncBatchNorm, residual: Tensor) -> bool:
    """Return whether a layer's call may change a residual, which it adds before.

    It is so if the residual is a view of the layer's running statistics.
    """
    if layer.running_mean is None or layer.running_var is None:
        return False
    if torch.compiler.is_compiling():  # which cannot compare the memory of tensors
        return residual.numel() <= layer.num_features or 0 in residual.stride()
    return any(
        torch._C._is_alias_of(residual, each)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- nothing public compares memory under function transforms
        for each in (layer.running_mean, layer.running_var)
    )


def _kind(values: tuple[Any, ...]) -> type | None:
    """Return which of the kinds of arguments that were traced these all are."""
    if all(isinstance(value, Tensor) and not isinstance(value, nn.Parameter) for value in values):
        return Tensor
    return list if all(type(value) is list for value in values) else None


def _has_global_hooks() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())  # pyright: ignore[reportPrivateUsage] -- nothing public tells


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _used(module: nn.Module, path: tuple[str, ...]) -> Any:
    """Return the submodule, parameter or buffer at a path, or None."""
    parent = _at(module, path[:-1])
    if parent is None or not path:
        return parent
    for held in (parent._modules, parent._parameters, parent._buffers):
        if path[-1] in held:
            return held[path[-1]]
    return None


def _shared(module: nn.Module, used: set[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Return all paths of each module or tensor that has several, one of which is used.

    A trace has only one of them, whichever the forward takes.
    """
    paths: dict[int, list[tuple[str, ...]]] = {}
    for name, each in (
        *module.named_modules(remove_duplicate=False),
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        paths.setdefault(id(each), []).append(_path(name))
    return [tuple(each) for each in paths.values() if len(each) > 1 and not used.isdisjoint(each)]


def _shapes(module: nn.Module, called: list[str]) -> list[Shape]:
    """Describe a module, and those in it that stand before what it calls, or are lists."""
    paths = {path[:end] for path in map(_path, called) for end in range(len(path))} | {()}
    # Also lists of which nothing is called: a member that is added later would be.
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        at = waiting.pop()
        for name, child in _at(module, at)._modules.items():
            if isinstance(child, LISTS):
                paths.add((*at, name))
                waiting.append((*at, name))
    shapes: list[Shape] = []
    for path in sorted(paths):
        found = _at(module, path)
        children = found._modules
        shapes.append(
            Shape(path, type(found), tuple(children), tuple(map(type, children.values())))
        )
    return shapes


def _has_shape(module: Any, shape: Shape) -> bool:
    if not isinstance(module, shape.kind):
        return False
    children = module._modules
    return tuple(children) == shape.names and all(
        isinstance(child, kind) for child, kind in zip(children.values(), shape.kinds, strict=True)
    )


def _is_ready(norm: Any) -> bool:
    kind = type(norm)
    return kind in PLAIN and _is_bare(norm, kind) and norm.training and not norm.fuses_relu


def _is_bare(module: Any, kind: type) -> bool:
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _has(module: Any, name: str, was: Any) -> bool:
    if isinstance(was, Member):
        return isinstance(module, nn.Module) and was.is_of(module, name)
    now = getattr(module, name, _ABSENT)
    return now is was or (type(now) is type(was) and now == was)
