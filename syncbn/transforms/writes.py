"""Whether a call in a graph may write to a tensor that exists already."""

import operator
from typing import Any

import torch
from torch import fx

# These return a new value or a view, whatever the operands are.
_READING = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.pow, operator.matmul, operator.neg, operator.pos, operator.abs, operator.invert),
    *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.getitem, getattr),
)


def may_write(node: fx.Node) -> bool:
    """Return whether a call may write to a tensor, by the operator's schema; True if unknown."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in _READING:
        return False
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and getattr(torch, _name(node.target), None) is node.target:
        name = _name(node.target)
    else:
        return True
    return "out" in node.kwargs or not _only_reads(name)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", ""))


def _only_reads(name: str) -> bool:
    """Return whether no overload of an operator writes to an argument other than `out`."""
    # The schemas of normalizations do not say that they write to the running statistics.
    if name.startswith("_") or name.endswith("_") or "norm" in name:
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return not any(
        argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
        for schema in schemas
        for argument in schema.arguments
    )
