"""What stands in the places of a model's batch normalizations."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from syncbn.errors import ModelError
from syncbn.layers.whitening import SyncWhitening

_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base


class ChannelAffine(nn.Module):
    """Batch normalization without the normalization: y = γ·x + β, each channel with its own.

    Computes nothing from the batch and tracks nothing, so it is the same in training and in
    evaluation.

    Args:
        layer: the batch normalization whose parameters it takes over, as weight γ and bias β of
            shape (C,); what the layer lacks of them is left out.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: _BASE) -> None:
        super().__init__()
        self.num_features = layer.num_features
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)

    def forward(self, input: Tensor) -> Tensor:
        """Return γ·x + β for x of shape (N, C, *), in x's shape and dtype."""
        shape = (-1, *[1] * (input.dim() - 2))
        output = input
        if self.weight is not None:
            output = output * self.weight.reshape(shape)
        if self.bias is not None:
            output = output + self.bias.reshape(shape)
        return output.to(input.dtype)  # as batch normalization does under autocast


def exchange_normalization(
    name: str, model: nn.Module, norm: str, make: Callable[[_BASE], nn.Module]
) -> nn.Module:
    """Return a model with what is made of it in the place of every batch normalization.

    Args:
        name: of the architecture.
        model: changed in place, unless it is a batch normalization itself.
        norm: what takes the places, as the arguments name it.
        make: called once with each batch normalization.

    Raises:
        ModelError: a batch normalization may do more than normalize.
    """
    replacements: dict[nn.Module, nn.Module] = {}  # a layer may sit in several places
    for key, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, _BASE):
            continue
        if type(layer).forward not in (_BASE.forward, nn.SyncBatchNorm.forward):
            raise ModelError(
                f"architecture {name!r} cannot have norm {norm!r}: {key!r}, a "
                f"{type(layer).__name__}, has a forward of its own that may do more than normalize"
            )
        if layer not in replacements:
            replacements[layer] = make(layer)
        replacement = replacements[layer]
        if key == "":
            return replacement
        model.set_submodule(key, replacement)
    return model


def make_whitening(layer: _BASE, arguments: Mapping[str, Any]) -> SyncWhitening:
    """Return what whitens in the place of a batch normalization, with its parameters.

    Args:
        layer: the batch normalization.
        arguments: of `build_model`.
    """
    channels = layer.num_features
    most = arguments.get("whitening_group_size", 16)
    options = {
        key: arguments[f"whitening_{key}"]
        for key in ("method", "iterations", "shrinkage")
        if f"whitening_{key}" in arguments
    }
    whitening = SyncWhitening(
        channels,
        max(size for size in range(1, min(most, channels) + 1) if channels % size == 0),
        eps=arguments.get("eps", layer.eps),
        momentum=arguments.get("momentum", layer.momentum),
        affine=layer.affine,
        **options,
    )
    if layer.affine:
        whitening.weight, whitening.bias = layer.weight, layer.bias
    return whitening.train(layer.training)


def set_normalization(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Set eps and momentum of every batch normalization if the arguments of `build_model` do."""
    for module in model.modules():
        if isinstance(module, _BASE):
            module.eps = arguments.get("eps", module.eps)
            module.momentum = arguments.get("momentum", module.momentum)
