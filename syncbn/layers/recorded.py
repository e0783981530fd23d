"""A layer's call where `torch.fx` records a model: one node that stands for all of it."""

from typing import Any

from torch import Tensor, fx, nn

from syncbn.errors import InputError


def record(layer: nn.Module, input: fx.Proxy, residual: Any) -> Any:
    """Record a call of a `SyncBatchNorm`'s forward, and return the proxy of its output.

    What the layer does depends on its mode, group and dtypes, which are known when the graph runs.
    So the graph calls the layer, as it does for torch's own; or `normalize` where what is around
    that, the forward of a subclass or hooks, is recorded by itself.

    Raises:
        InputError: the layer is the whole model that is traced.
    """
    tracer: Any = input.tracer
    name: str = tracer.path_of_module(layer)
    if not name:
        raise InputError(
            "torch.fx cannot trace a SyncBatchNorm by itself, because a graph calls the parts of "
            "a model; trace nn.Sequential(layer)"
        )
    args = (input,) if residual is None else (input, residual)
    hooks = layer._forward_hooks or layer._forward_pre_hooks  # pyright: ignore[reportPrivateUsage] -- nothing public tells
    inherited = type(layer).forward is _forward() and "forward" not in vars(layer)
    if inherited and not hooks:
        return tracer.create_proxy("call_module", name, args, {})
    return tracer.create_proxy("call_function", normalize, (layer, *args), {})


def normalize(layer: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return what the forward of `SyncBatchNorm` does, for a layer of any subclass."""
    return _forward()(layer, input, residual)


def _forward() -> Any:
    from syncbn.layers.batch_norm import SyncBatchNorm  # which imports this file

    return SyncBatchNorm.forward
