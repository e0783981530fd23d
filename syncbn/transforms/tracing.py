"""What a model's forward calls, read off traces of it by `torch.fx`."""

import copy
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage] -- as above

_MOST_TRACES = 16
ADVICE = "what the model only calls can be passed on its own"


class KeptError(Exception):
    """Why a normalization, or all of them of a model, stays as it is."""


def untraceable(error: Exception) -> KeptError:
    """Return the reason where a model's own code failed on a trace's proxies."""
    return KeptError(f"torch.fx cannot trace its model, {type(error).__name__}: {error}; {ADVICE}")


class Tracer(fx.Tracer):
    """Records calls of the layers of interest, and which of their outputs something holds on to."""

    proxy_buffer_attributes = True  # otherwise a trace would not record that a buffer is read

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[fx.Proxy]] = []
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call, unless it is of another thread: fx exchanges every module's `__call__`."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a module's attribute, or what stands for it; to another thread, the attribute."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as a whole, and not looked into."""
        # What hooks do with a container's inputs and outputs is unknown, so it is a closed box.
        hooked = m._forward_hooks or m._forward_pre_hooks  # pyright: ignore[reportPrivateUsage] -- nothing public tells
        layer = isinstance(m, _BatchNorm | _ConvNd | nn.Linear)
        return bool(hooked) or layer or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a node's output, and remember it."""
        return self.remember(super().proxy(node))

    def remember(self, made: fx.Proxy) -> fx.Proxy:
        """Return a stand-in, and note it for `held`."""
        self.outputs.append(weakref.ref(made))
        return made

    def held(self) -> frozenset[fx.Node]:
        """Return the nodes whose output something still holds on to, after the trace."""
        return frozenset(made.node for ref in self.outputs if (made := ref()) is not None)


class _Call(nn.Module):
    """Calls a model with proxies for its arguments, so that it is traced as its users call it."""

    def __init__(self, model: nn.Module, tracer: Tracer, given: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._tracer, self._given = model, tracer, given

    def forward(self) -> Any:
        args: list[Any] = []
        named: dict[str, Any] = {}
        for name, parameter in parameters_of(self.model).items():
            if name in self._given:
                value = self._given[name]
            else:
                value = self._tracer.create_proxy("placeholder", name, (), {})
            if parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                named[name] = value
        return self.model(*args, **named)


@dataclass(frozen=True)
class Trace:
    """One way through the forward: the calls of each module, and what it does besides.

    Attributes:
        graph: of which `calls` and `held` are nodes.
        calls: by the qualified name of the module.
        read: the qualified names of modules whose tensors the forward itself reads.
        held: whose output the forward has stored somewhere.
    """

    graph: fx.Graph
    calls: dict[str, list[fx.Node]]
    read: frozenset[str]
    held: frozenset[fx.Node]


def copy_of(model: nn.Module, *, share_tensors: bool = False) -> nn.Module:
    """Return a deep copy of a model that shares process groups, and its tensors if asked to."""
    # A process group stands for connections; a lazy buffer refuses. Neither needs to be copied.
    shared: list[Any] = [getattr(module, "process_group", None) for module in model.modules()]
    tensors = (*model.parameters(), *model.buffers())
    shared += [tensor for tensor in tensors if share_tensors or nn.parameter.is_lazy(tensor)]
    return copy.deepcopy(model, {id(each): each for each in shared if each is not None})


def norms(model: nn.Module) -> list[str]:
    """Return the qualified names of a model's batch normalizations."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return what a model's forward takes."""
    return dict(inspect.signature(model.forward).parameters)


def traces_of(model: nn.Module) -> list[Trace]:
    """Trace a model's forward with every combination of its optional arguments.

    A proxy is never None, so that without this a branch for an absent argument would go unseen.
    """
    try:
        choices: list[list[dict[str, Any]]] = []
        for name, parameter in parameters_of(model).items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise KeptError(
                    f"its model's forward takes any number of arguments, {parameter}; {ADVICE}"
                )
            if isinstance(parameter.default, bool):
                choices.append([{name: False}, {name: True}])
            elif parameter.default is not parameter.empty:
                choices.append([{name: parameter.default}, {}])
        if 2 ** len(choices) > _MOST_TRACES:
            raise KeptError(
                f"its model's forward has {len(choices)} optional arguments, too many to trace "
                f"each combination of them; {ADVICE}"
            )
        return [
            _trace(model, {name: value for given in combination for name, value in given.items()})
            for combination in itertools.product(*choices)
        ]
    except KeptError:
        raise
    except Exception as error:  # whatever the model's own code makes of proxies
        raise untraceable(error) from error


def _trace(model: nn.Module, given: dict[str, Any]) -> Trace:
    # The forward runs, and may change attributes; parameters and buffers it sees as proxies.
    tracer = Tracer()
    root = _Call(copy_of(model, share_tensors=True), tracer, given)
    graph = tracer.trace(root)
    calls: dict[str, list[fx.Node]] = {}
    read: set[str] = set()
    for node in graph.nodes:
        name = str(node.target).partition(".")[2]  # without "model."
        if node.op == "call_module":
            calls.setdefault(name, []).append(node)
        elif node.op == "get_attr":
            read.add(name.rpartition(".")[0])
    return Trace(graph, calls, frozenset(read), tracer.held())


def is_plain(module: nn.Module) -> bool:
    """Return whether a module does what its class says, without hooks or another forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(vars(module).get(name) for name in hooks)
