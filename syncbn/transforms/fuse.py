"""Batch normalization that takes the addition and the ReLU after it along, for training."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from syncbn.layers.batch_norm import BatchNorm, SyncBatchNorm
from syncbn.transforms.tracing import (
    ADVICE,
    KeptError,
    Tracer,
    copy_of,
    is_plain,
    norms,
    parameters_of,
    untraceable,
)

_RELUS = ("relu", "relu_", torch.relu, torch.relu_, functional.relu, functional.relu_)
_ADDITIONS = ("add", "add_", operator.add, operator.iadd, torch.add)
_IN_PLACE_ADDITIONS = ("add_", operator.iadd)
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
    """Return a copy whose synchronised normalizations take the ReLU, or residual and ReLU, along.

    relu(bn(x)) becomes `bn(x)`, relu(bn(x) + residual) becomes `bn(x, residual)`, and so does
    bn(x) + residual: one pass over memory instead of two or three, and with a ReLU alone one tensor
    less that is kept for the backward pass. Results and gradients are those of before, up to the
    rounding of bn(x) to a half-precision dtype, which is left out. The names of parameters and
    buffers, and so the state dict, stay.

    The copy is a `torch.fx.GraphModule`: the calls that the forward makes, without the Python
    around them. So the whole model is left as it is, and every normalization kept, where that would
    not do: its forward takes another way in training than in evaluation, has optional arguments,
    depends on values, or stores what it computes. Parts that it only calls can be fused on their
    own: `model.backbone = fuse(model.backbone).model`

    A normalization is kept, and the reason told, unless it is a `SyncBatchNorm` (see
    `convert_sync_batchnorm`) that is called once, whose output goes into a ReLU or addition and
    nowhere else, and neither has hooks; and unless nothing is changed in place in between.

    Make the optimizer, and DistributedDataParallel, of the copy. Does not communicate: on several
    replicas, call it on each.

    Args:
        model: any module, in any mode; left unchanged.

    Returns:
        The copy, and which normalizations take what along. Without any it is a plain copy.
    """
    fused = copy_of(model)
    try:
        graph = _graph(fused)
    except KeptError as error:
        return Fusion(copy_of(model), {}, dict.fromkeys(norms(model), str(error)))
    taken: dict[str, str] = {}
    kept = dict.fromkeys(norms(model), "the forward never calls it")
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in kept:
            continue
        name = str(node.target)
        try:
            taken[name] = _fuse_one(fused, graph, node)
            del kept[name]
        except KeptError as error:
            kept[name] = str(error)
    if not taken:
        return Fusion(copy_of(model), {}, kept)
    graph.lint()
    # Named as the model's class, for whoever prints it.
    return Fusion(fx.GraphModule(fused, graph, type(model).__name__), taken, kept)


def _graph(model: nn.Module) -> fx.Graph:
    """Return the calls of a model's forward, if they are always the same."""
    if not is_plain(model):
        raise KeptError(f"its model has hooks or an exchanged forward; {ADVICE}")
    for parameter in parameters_of(model).values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or (
            parameter.default is not parameter.empty
        ):
            raise KeptError(f"its model's forward may do without {parameter}; {ADVICE}")
    modes = {name: module.training for name, module in model.named_modules()}
    graphs: list[fx.Graph] = []
    try:
        for training in (False, True):
            model.train(training)
            tracer = Tracer()
            # On a copy, because the forward runs, and may change attributes.
            graphs.append(tracer.trace(copy_of(model, share_tensors=True)))
            if tracer.held():
                raise KeptError(f"its model's forward stores what it computes; {ADVICE}")
    except KeptError:
        raise
    except Exception as error:  # whatever the model's own code makes of proxies
        raise untraceable(error) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    evaluation, training = map(str, graphs)
    if evaluation != training:
        raise KeptError(f"its model's forward takes another way in evaluation; {ADVICE}")
    return graphs[1]


def _fuse_one(model: nn.Module, graph: fx.Graph, norm: fx.Node) -> str:
    """Let a normalization take along what follows it; return what."""
    layer = _layer(model, graph, norm)
    following = _only_user(norm)
    taken: dict[str, fx.Node] = {}
    residual, last = None, norm
    if _is_addition(following):
        residual = _residual(graph, norm, following)
        last = taken["add"] = following
    if len(last.users) == 1 and _is_relu(model, _only_user(last)):
        last = taken["relu"] = _only_user(last)
    if not taken:
        what = getattr(following.target, "__name__", following.target)
        raise KeptError(f"{what} comes after it, and neither a ReLU nor an addition")
    _check_between(model, graph, norm, last, taken)
    if residual is not None:
        norm.args = (*norm.args, residual)
    last.replace_all_uses_with(norm)
    for node in reversed(taken.values()):
        graph.erase_node(node)
    layer.fuses_relu = "relu" in taken
    layer.__dict__["_reverts_to"] = BatchNorm
    return ", ".join(taken)


def _layer(model: nn.Module, graph: fx.Graph, norm: fx.Node) -> SyncBatchNorm:
    layer = model.get_submodule(str(norm.target))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    if type(layer) is not SyncBatchNorm:
        reason = f"it is a {type(layer).__name__}, and not a SyncBatchNorm"
    elif layer.fuses_relu or len(norm.args) != 1 or norm.kwargs:
        reason = "it takes a ReLU or a residual along already"
    elif not is_plain(layer):
        reason = "it has hooks or an exchanged forward"
    elif sum(model.get_submodule(str(node.target)) is layer for node in calls) > 1:
        reason = "it is called more than once"
    else:
        return layer
    raise KeptError(reason)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise KeptError(f"its output goes to {len(node.users)} places")
    return next(iter(node.users))


def _is_relu(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) is nn.ReLU and is_plain(module)
    return node.target in _RELUS


def _is_addition(node: fx.Node) -> bool:
    known = node.op in ("call_function", "call_method") and node.target in _ADDITIONS
    return known and len(node.args) == 2 and not node.kwargs


def _residual(graph: fx.Graph, norm: fx.Node, addition: fx.Node) -> fx.Node:
    """Return what is added to a normalization's output, if it can be given to it instead."""
    other = addition.args[1] if addition.args[0] is norm else addition.args[0]
    if not isinstance(other, fx.Node) or other is norm or other.target in _NUMBERS:
        raise KeptError("what is added to it is no other tensor")
    order = list(graph.nodes)
    if order.index(other) > order.index(norm):
        raise KeptError(f"what is added to it, {other.name}, is computed after it")
    if (
        addition.target in _IN_PLACE_ADDITIONS
        and addition.args[0] is other
        and len(other.users) > 1
    ):
        raise KeptError(f"it is added in place to {other.name}, which is used elsewhere too")
    return other


def _check_between(
    model: nn.Module, graph: fx.Graph, norm: fx.Node, last: fx.Node, taken: dict[str, fx.Node]
) -> None:
    """Raise where something in between may change a tensor that would be read earlier, or later."""
    order = list(graph.nodes)
    for node in order[order.index(norm) + 1 : order.index(last)]:
        if node not in taken.values() and _changes_in_place(model, node):
            raise KeptError(f"{node.name} changes a tensor in place before {last.name}")


def _changes_in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module: Any = model.get_submodule(str(node.target))
        known = type(module).__module__.startswith("torch.nn.modules.")
        return not known or bool(getattr(module, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    iadd = getattr(operator, name, None) is node.target and name.startswith("i")
    return name.endswith("_") or iadd or name == "setitem" or bool(node.kwargs.get("inplace"))
