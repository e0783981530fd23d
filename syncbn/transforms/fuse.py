"""Fuse a batch normalization with the addition and the ReLU that follow it, for training."""

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.node import Argument
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base

from syncbn.layers.converted import PLAIN
from syncbn.transforms.forward_graph import IN_PLACE, LISTS, ForwardGraph, forward_graphs
from syncbn.transforms.fused_module import give_forward, normalized, variant
from syncbn.transforms.tracing import KeptError, copy_of, is_plain, norms
from syncbn.transforms.writes import may_write

_RELUS = ("relu", "relu_", torch.relu, torch.relu_, functional.relu, functional.relu_)
_IN_PLACE_ADDITIONS = ("add_", IN_PLACE["iadd"])
_ADDITIONS = ("add", operator.add, torch.add, *_IN_PLACE_ADDITIONS)
# What gives numbers and no tensors, which a normalization could not add.
_NUMBERS = ("size", "dim", "numel", "item", getattr, len)


@dataclass(frozen=True)
class Fusion:
    """What `fuse` made of a model.

    Attributes:
        model: the fused copy.
        fused: what each normalization takes along, "relu", "add" or "add, relu", by its qualified
            name.
        kept: the qualified name of each other batch normalization, and why nothing is fused.
    """

    model: nn.Module
    fused: dict[str, str]
    kept: dict[str, str]


def fuse(model: nn.Module) -> Fusion:
    """Return a copy whose synchronized normalizations take the ReLU, or residual and ReLU, along.

    In training, relu(bn(x)) is computed as `bn(x)` with a ReLU, and relu(bn(x) + residual) or
    bn(x) + residual as `bn(x, residual)`: one pass over memory instead of two or three, and with a
    ReLU alone one tensor less that is kept for the backward pass. Results and gradients are those
    of before, up to the rounding of bn(x) to a half-precision dtype, which is left out.

    The copy has all that the model has: submodules and methods, used or not, parameters, buffers,
    the state dict and their order, and hooks. Only the class of each module whose forward calls a
    fused normalization is replaced, by a subclass with another forward, which runs what `torch.fx`
    traced of the original one. It runs the original forward itself

    - in evaluation mode,
    - for arguments that are neither all tensors nor all lists,
    - and whenever something differs from when it was traced: a fused module, a module that it
      calls, or an attribute, method or tensor that it reads has been replaced; a normalization or
      ReLU that it fuses has been given hooks, been frozen, or been reverted; or hooks for all
      modules are registered.

    So the normalizations remain what they are for everyone else who calls them. Do not train one
    copy in several threads at once: a layer has its ReLU only during such a call.

    A normalization is kept, and the reason told, unless it is a `SyncBatchNorm` (see
    `convert_sync_batchnorm`) that a forward calls once, whose output goes into a ReLU or addition
    and nowhere else, and neither has hooks; unless what is added to it exists before it and is
    certain not to be changed in between; and unless the forward is certain to do nothing but its
    calls: it has no optional arguments, depends on no values, sets no attributes, uses no globals
    but functions and classes, is not wrapped by a decorator of a library (such as
    `torch.autocast`), makes no containers but lists, dicts and tuples, and passes no list or dict
    to a submodule. A submodule is assumed not to return None, and functions and classes not to be
    replaced.

    A pickled copy is loaded as the model was before; fuse it again. A deep copy is fused. Make the
    optimizer, and DistributedDataParallel, of the copy. Does not communicate, and leaves the order
    of reductions as it is: replicas need not fuse the same.

    Args:
        model: any module, in any mode; left unchanged.

    Returns:
        The copy, and which normalizations take what along. Without any it is a plain copy.
    """
    copied = copy_of(model)
    names = {id(copied.get_submodule(name)): name for name in norms(copied)}
    kept = dict.fromkeys(names.values(), "no forward calls it")
    own_reasons: dict[str, str] = {}
    taken: dict[str, str] = {}
    forwards: list[_Forward] = []
    for module in copied.modules():  # from the outside to the inside
        within = [names[id(each)] for each in module.modules() if id(each) in names]
        if not within or not _has_forward(module):
            continue
        try:
            forward = _Forward(module)
        except KeptError as error:
            kept.update(dict.fromkeys(within, str(error)))
            continue
        forwards.append(forward)
        own_reasons |= {names[each]: reason for each, reason in forward.kept.items()}
    # From the inside to the outside, because a forward compares the classes of what it calls.
    for forward in reversed(forwards):
        try:
            forward.replace()
            taken |= {names[each]: what for each, what in forward.fused.items()}
        except KeptError as error:
            own_reasons |= {names[each]: str(error) for each in forward.fused}
    kept = {name: own_reasons.get(name, reason) for name, reason in kept.items()}
    fused = {name: taken[name] for name in kept if name in taken}
    return Fusion(copied, fused, {n: reason for n, reason in kept.items() if n not in taken})


def _has_forward(module: nn.Module) -> bool:
    """Return whether a module is one whose forward is to be looked at."""
    torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, LISTS)
    return not (
        torchs
        or isinstance(module, _BatchNorm)
        or (type(module).forward is nn.Module.forward and "forward" not in vars(module))
    )


class _Forward:
    """The forward of one module, and what is fused in it.

    Attributes:
        fused: what each normalization takes along, by its id.
        kept: why another one does not, by its id.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.fused: dict[int, str] = {}
        self.kept: dict[int, str] = {}
        self._graphs = [_Graph(module, traced) for traced in forward_graphs(module)]
        for graph in self._graphs:
            for node in graph.calls:
                layer = module.get_submodule(str(node.target))
                if not isinstance(layer, _BatchNorm):
                    continue
                try:
                    self.fused[id(layer)] = graph.fuse(node)
                except KeptError as error:
                    self.kept[id(layer)] = str(error)

    def replace(self) -> None:
        """Let the module run what was fused."""
        variants = [
            variant(self.module, graph.traced, graph.norms, graph.bare)
            for graph in self._graphs
            if graph.norms
        ]
        if variants:
            give_forward(self.module, variants)


@dataclass
class _Graph:
    """A forward's graph while normalizations in it take along what follows them."""

    module: nn.Module
    traced: ForwardGraph
    norms: list[str] = field(default_factory=list[str])
    bare: list[str] = field(default_factory=list[str])

    @property
    def calls(self) -> list[fx.Node]:
        """The calls of modules."""
        return [node for node in self.traced.graph.nodes if node.op == "call_module"]

    def fuse(self, norm: fx.Node) -> str:
        """Let a normalization take along what follows it; return what."""
        self._check_layer(norm)
        following = _only_user(norm)
        taken: dict[str, fx.Node] = {}
        residual, last = None, norm
        if _is_addition(following):
            residual = self._residual(norm, following)
            last = taken["add"] = following
        if len(last.users) == 1 and self._is_relu(_only_user(last), last):
            last = taken["relu"] = _only_user(last)
        if not taken:
            what = "an output" if following.op == "output" else _called(following)
            raise KeptError(f"{what} comes after it, and neither a ReLU nor an addition")
        _check_between(self.traced.graph, norm, last, taken)
        with self.traced.graph.inserting_before(norm):
            layer = self.traced.graph.create_node("get_attr", str(norm.target))
            choices: dict[str, Argument] = {
                "adds": "add" in taken,
                "residual_first": residual is not None and following.args[0] is residual,
                "onto_output": residual is not None and _is_onto(norm, following),
                "onto_residual": residual is not None and _is_onto(residual, following),
                "relu": "relu" in taken,
            }
            call = self.traced.graph.create_node(
                "call_function", normalized, (layer, norm.args[0], residual), choices
            )
        last.replace_all_uses_with(call)
        for node in (*reversed(taken.values()), norm):
            if node.op == "call_module":
                (self.norms if node is norm else self.bare).append(str(node.target))
            self.traced.graph.erase_node(node)
        return ", ".join(taken)

    def _check_layer(self, norm: fx.Node) -> None:
        layer = self.module.get_submodule(str(norm.target))
        calls = [self.module.get_submodule(str(node.target)) for node in self.calls]
        if type(layer) not in PLAIN:
            raise KeptError(f"it is a {type(layer).__name__}, and not a SyncBatchNorm")
        if layer.fuses_relu or len(norm.args) != 1 or norm.kwargs:
            raise KeptError("it takes a ReLU or a residual along already")
        if not is_plain(layer):
            raise KeptError("it has hooks or an exchanged forward")
        if sum(call is layer for call in calls) > 1:
            raise KeptError("it is called more than once")

    def _residual(self, norm: fx.Node, addition: fx.Node) -> fx.Node:
        """Return what is added to a normalization's output, if it can be given to it instead."""
        other = addition.args[1] if addition.args[0] is norm else addition.args[0]
        if not isinstance(other, fx.Node) or other is norm or other.target in _NUMBERS:
            raise KeptError("what is added to it is no other tensor")
        if (
            addition.op == "call_method"
            and other is addition.args[0]
            and not self._is_tensor(other)
        ):
            raise KeptError(f"it is added by a method of {other.name}, which may be no tensor")
        order = list(self.traced.graph.nodes)
        if order.index(other) > order.index(norm):
            raise KeptError(f"what is added to it, {other.name}, is computed after it")
        if _is_onto(other, addition) and not self._is_new(other):
            raise KeptError(f"it is added in place to {other.name}, which may be used elsewhere")
        return other

    def _is_tensor(self, node: fx.Node) -> bool:
        """Return whether a value is certain to be a tensor, or one of the arguments."""
        if node.op == "call_module":
            return type(self.module.get_submodule(str(node.target))) in PLAIN
        return node.op == "placeholder" or node.target is normalized

    def _is_new(self, node: fx.Node) -> bool:
        """Return whether a tensor is certain to share its memory with nothing that is used."""
        if len(node.users) != 1:
            return False
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            self.bare.append(str(node.target))
            return type(layer) in PLAIN and is_plain(layer)
        return node.target is normalized

    def _is_relu(self, node: fx.Node, given: fx.Node) -> bool:
        if node.all_input_nodes != [given] or given not in (*node.args, node.kwargs.get("input")):
            return False
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return type(module) is nn.ReLU and is_plain(module)
        return node.op != "output" and node.target in _RELUS


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise KeptError(f"its output goes to {len(node.users)} places")
    return next(iter(node.users))


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _is_addition(node: fx.Node) -> bool:
    known = node.op in ("call_function", "call_method") and node.target in _ADDITIONS
    return known and len(node.args) == 2 and not node.kwargs


def _is_onto(node: fx.Node, addition: fx.Node) -> bool:
    """Return whether an addition is one in place to a node's output."""
    return addition.target in _IN_PLACE_ADDITIONS and addition.args[0] is node


def _check_between(
    graph: fx.Graph, norm: fx.Node, last: fx.Node, taken: dict[str, fx.Node]
) -> None:
    """Raise if something in between may write to what the normalization will have read by then."""
    order = list(graph.nodes)
    for node in order[order.index(norm) + 1 : order.index(last)]:
        if node not in taken.values() and may_write(node):
            raise KeptError(f"{node.name} may change a tensor in place before {last.name}")
