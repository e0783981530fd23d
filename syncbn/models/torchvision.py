"""torchvision's image classifiers by name."""

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args

import torch
from torch import nn

from syncbn.errors import ModelError

PREFIX = "torchvision."

_DOWNLOADS = ("weights", "weights_backbone", "progress", "pretrained", "pretrained_backbone")
# What a builder reads itself, before a model whose constructor swallows any argument.
_OF_THE_BUILDER: Mapping[str, tuple[str, ...]] = {
    "mobilenet_v3_large": ("width_mult", "reduced_tail", "dilated"),
    "mobilenet_v3_small": ("width_mult", "reduced_tail", "dilated"),
}


def names() -> tuple[str, ...]:
    """Return every name that `factory` takes.

    Raises:
        ImportError: torchvision is not installed.
    """
    return tuple(PREFIX + name for name in _builders())


def known(name: str) -> tuple[str, ...]:
    """Return `names`, for a name that was asked for.

    Raises:
        ModelError: torchvision is not installed.
    """
    try:
        return names()
    except ImportError as error:
        raise ModelError(f"architecture {name!r} needs torchvision: {error}") from error


def factory(
    name: str, arguments: Mapping[str, Any]
) -> tuple[Callable[..., nn.Module], Mapping[str, Any] | None]:
    """Return a factory of one of torchvision's models, and what it takes, if that shows.

    Args:
        name: one of `names`.
        arguments: what it will be called with.

    Raises:
        ModelError: an argument would download weights, or make it return more than logits.
    """
    for argument in arguments:
        if argument in _DOWNLOADS:
            raise ModelError(
                f"architecture {name!r} takes no argument {argument!r} here: pretrained weights "
                "are never downloaded"
            )
    if arguments.get("aux_logits"):
        raise ModelError(
            f"argument 'aux_logits' of architecture {name!r} must be False: the output would be "
            "more than one tensor of logits"
        )
    key = name.removeprefix(PREFIX)
    builder = _builders()[key]
    kind = inspect.signature(builder).return_annotation
    takes = None
    # One tensor of logits; and the initialization that builders warn about when it is left open.
    fixed: dict[str, Any] = {"weights": None}
    if isinstance(kind, type):
        parameters = inspect.signature(kind).parameters
        takes = {
            argument: object
            for argument, parameter in parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD and _is_plain(parameter.annotation)
        } | dict.fromkeys(_OF_THE_BUILDER.get(key, ()), object)
        defaults = {"aux_logits": False, "init_weights": True}
        fixed |= {argument: defaults[argument] for argument in defaults.keys() & takes.keys()}

    def make(in_channels: int, **others: Any) -> nn.Module:
        model = builder(**(fixed | others))
        if in_channels != 3:
            _set_in_channels(model, in_channels)
        return model

    return make, takes


def _builders() -> Mapping[str, Callable[..., nn.Module]]:
    """Return torchvision's builders of image classifiers, by name."""
    with torch.device("cpu"):  # a model may be asked for without memory, this module must be real
        from torchvision import models

    return {name: models.get_model_builder(name) for name in models.list_models(module=models)}


def _is_plain(annotation: Any) -> bool:
    """Return whether values of an annotated type can be written in a configuration."""
    if parts := get_args(annotation):
        return all(map(_is_plain, parts))
    return annotation in (bool, int, float, str, NoneType, inspect.Parameter.empty)


def _set_in_channels(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution of a model for images of 3 channels."""
    for key, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            replacement = nn.Conv2d(
                in_channels,
                layer.out_channels,
                layer.kernel_size,  # pyright: ignore[reportArgumentType] -- torch types it as a tuple of any length
                layer.stride,  # pyright: ignore[reportArgumentType] -- as above
                layer.padding,  # pyright: ignore[reportArgumentType] -- as above
                layer.dilation,  # pyright: ignore[reportArgumentType] -- as above
                layer.groups,
                layer.bias is not None,
                layer.padding_mode,
            )
            model.set_submodule(key, replacement)
            return
    raise ValueError("it has no convolution of 3 channels to replace")
