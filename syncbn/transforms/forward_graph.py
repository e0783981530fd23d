"""The graph of one module's own forward, in which the modules that it calls are single nodes."""

import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.nn.utils import parametrize

from syncbn.layers.converted import PLAIN
from syncbn.transforms.purity import Watch, attributes, is_from_torch
from syncbn.transforms.tracing import (
    ADVICE,
    KeptError,
    Tracer,
    copy_of,
    is_plain,
    parameters_of,
    untraceable,
)

KINDS = (Tensor, list)
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Of a tensor: what may be None, or be written to unseen.
_UNSEEN_ATTRIBUTES = ("grad", "grad_fn", "data", "_grad", "_base", "_backward_hooks")
_IN_PLACE = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


@dataclass(frozen=True)
class ForwardGraph:
    """What a module's forward calls, for arguments of one kind, and what that depends on.

    Attributes:
        graph: the calls.
        kinds: of arguments, of which all must be one: Tensor or list.
        inlined: paths of the `nn.Sequential`s whose members the graph calls themselves.
        attributes: paths, names and values of the attributes that the forward may read.
    """

    graph: fx.Graph
    kinds: tuple[type, ...]
    inlined: tuple[str, ...]
    attributes: tuple[tuple[str, str, Any], ...]


def forward_graphs(module: nn.Module) -> list[ForwardGraph]:
    """Trace a module's forward in training, with tensors, and with lists if that may matter.

    Args:
        module: left unchanged.

    Raises:
        KeptError: the forward may do more than the graph would, or the same not always.
    """
    _check(module)
    first = _trace(module, Tensor)
    return [first] if list in first.kinds else [first, _trace(module, list)]


def _trace(module: nn.Module, kind: type) -> ForwardGraph:
    twin = copy_of(module, share_tensors=True)  # the forward runs, and may change attributes
    if not twin.training:
        nn.Module.train(twin)
    inlined = {each: path for path, each in twin.named_children() if _ends_with_norm(each)}
    tracer = _Tracer(kind, frozenset(inlined))
    watch = Watch()
    try:
        with watch:
            graph = tracer.trace(twin)
    except KeptError:
        raise
    except Exception as error:  # whatever the module's own code makes of stand-ins
        raise untraceable(error) from error
    # fx itself holds on to those of parameters and buffers.
    if any(node.op != "get_attr" for node in tracer.held()):
        raise KeptError(f"its model's forward stores what it computes; {ADVICE}")
    read = tuple(attributes(twin, watch.check()))
    tensors = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tensors.update(name for name, _ in module.named_buffers(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            raise KeptError("its model's forward uses a tensor that is no parameter or buffer")
    kinds = (kind,) if tracer.was_asked else KINDS
    return ForwardGraph(graph, kinds, tuple(inlined.values()), read)


def _check(module: nn.Module) -> None:
    if hasattr(type(module), "class_before_fuse"):
        raise KeptError("its model is fused already")
    if "forward" in vars(module):
        raise KeptError("its model has an exchanged forward")
    if isinstance(module, fx.GraphModule) or parametrize.is_parametrized(module):
        raise KeptError(f"its model is a {type(module).__name__}, whose class is made for it")
    for parameter in parameters_of(module).values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or (
            parameter.default is not parameter.empty
        ):
            raise KeptError(f"its model's forward may do without {parameter}; {ADVICE}")


def _ends_with_norm(module: nn.Module) -> bool:
    """Return whether a sequence can be looked into, because its last output is a normalization's.

    So is the shortcut of a residual block. What calls it can do the same itself.
    """
    if type(module) is not nn.Sequential or not is_plain(module):
        return False
    members = list(module.children())
    return bool(members) and type(members[-1]) in PLAIN


class _Opaque:
    """A stand-in that does not let itself be taken for what it is not."""

    kind: type | None = None  # of an argument: which it stands for
    tracer: Any

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride] -- isinstance() asks for it
        asking = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] -- no other way to know
        if is_from_torch(asking):
            return type(self)
        if self.kind is None:
            raise KeptError("its model's forward looks at the type of what it computes")
        self.tracer.was_asked = True
        return self.kind

    def __getattr__(self, name: str) -> Any:
        if name in _UNSEEN_ATTRIBUTES:
            raise KeptError(f"its model's forward uses the attribute {name!r} of a tensor")
        made = _Attribute(self, name)  # pyright: ignore[reportArgumentType] -- mixed into proxies alone
        if not callable(getattr(Tensor, name, None)):
            # Read it now: fx would do so at its first use, by when it may have another value.
            _ = made.node
        return made


class _Value(_Opaque, fx.Proxy):
    pass


class _Attribute(_Opaque, Attribute):
    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record the call of a method, which must be a tensor's.

        Another object's, such as that of a list, could keep or change a list that it is given, of
        which the graph has only a copy.
        """
        if not callable(getattr(Tensor, self.attr, None)):
            raise KeptError(
                f"its model's forward calls the method {self.attr!r}, which tensors do not have"
            )
        return super().__call__(*args, **kwargs)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    change = getattr(operator, f"i{name}")

    def call(value: Any, other: Any) -> Any:
        return change(value, other)

    call.__name__ = call.__qualname__ = f"i{name}"
    return call


# fx would record `a += b` as a + b, and write operator.iadd(a, b) in code so that it changed the
# value of `a` for everyone, even if that is a number.
IN_PLACE = {f"i{name}": _in_place(name) for name in _IN_PLACE}


def _recorder(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name, _function in IN_PLACE.items():
    setattr(_Opaque, f"__{_name}__", _recorder(_function))


def _containers(value: Any) -> Iterator[Any]:
    """Yield the containers that a value consists of, itself first."""
    # By their types, because a stand-in does not let itself be asked what it is.
    if issubclass(type(value), dict):
        yield value
        for each in value.values():
            yield from _containers(each)
    elif issubclass(type(value), (list, tuple, set, frozenset)):
        yield value
        for each in value:
            yield from _containers(each)


class _Tracer(Tracer):
    def __init__(self, kind: type, inlined: frozenset[nn.Module]) -> None:
        super().__init__()
        self.was_asked = False  # for the type of an argument
        self._kind, self._inlined = kind, inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as a whole: each but the sequences to look into."""
        return m not in self._inlined

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call of a module, which the graph must be able to repeat."""
        kinds = (
            inspect.getattr_static(type(m), "__call__"),
            inspect.getattr_static(nn.Module, "__call__"),
        )
        if kinds[0] is not kinds[1]:
            raise KeptError(
                f"its model's forward calls a {type(m).__name__}, which has its own __call__"
            )
        if any(type(value) in (list, dict) for value in _containers((*args, *kwargs.values()))):
            raise KeptError(
                f"its model's forward gives a list or dict to a {type(m).__name__}, which may "
                "change it"
            )
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what stands for a parameter or buffer, read anew each time.

        A module that is called in between may have replaced its buffer.
        """
        return super().getattr(attr, attr_val, {})

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument or output in the graph, which makes it anew."""
        for value in _containers(a):
            kind = type(value)
            if kind not in (list, dict, tuple) and not hasattr(kind, "_fields"):
                raise KeptError(
                    f"its model's forward makes an {kind.__name__}, which a graph cannot repeat"
                )
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a node's output, and remember it."""
        made = _Value(node, self)
        if node.op == "placeholder":
            made.kind = self._kind
        return self.remember(made)
