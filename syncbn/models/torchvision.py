"""torchvision's image classifiers and semantic segmentation models by name."""

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

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
    return tuple(PREFIX + name for builders in _builders() for name in builders)


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
    key = name.removeprefix(PREFIX)
    classifiers, segmenters = _builders()
    if key in segmenters:
        builder = segmenters[key]
        takes, fixed = _of_segmenter(builder)
        finish = Segmenter
    else:
        if arguments.get("aux_logits"):
            raise ModelError(
                f"argument 'aux_logits' of architecture {name!r} must be False: the output would "
                "be more than one tensor of logits"
            )
        builder = classifiers[key]
        takes, fixed = _of_classifier(key, builder)
        finish = None

    def make(in_channels: int, **others: Any) -> nn.Module:
        model = builder(**(fixed | others))
        if in_channels != 3:
            _set_in_channels(model, in_channels)
        return model if finish is None else finish(model)

    return make, takes


class Segmenter(nn.Module):
    """One of torchvision's segmentation models, with tensors for output instead of a dictionary.

    Its state dict is that of torchvision's, whose parts it takes over.

    Args:
        model: torchvision's model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone: nn.Module = model.get_submodule("backbone")
        self.classifier: nn.Module = model.get_submodule("classifier")
        self.aux_classifier: nn.Module | None = getattr(model, "aux_classifier", None)
        # LRASPP's head takes features of two sizes, the others' one.
        self._has_two_sizes = type(model).__name__ == "LRASPP"
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits, (N, num_classes, H, W), of images (N, in_channels, H, W).

        In training mode, a model with an auxiliary head returns its logits too, as the second of
        two, and each as large as the images.
        """
        features = self.backbone(x)
        size = x.shape[-2:]
        given = features if self._has_two_sizes else features["out"]
        logits = interpolate(self.classifier(given), size=size, mode="bilinear")
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, interpolate(self.aux_classifier(features["aux"]), size=size, mode="bilinear")


_Builders = Mapping[str, Callable[..., nn.Module]]


def _of_classifier(
    key: str, builder: Callable[..., nn.Module]
) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """Return what the builder of a classifier takes, if that shows, and what is fixed of it."""
    # One tensor of logits; and the initialization that builders warn about when it is left open.
    fixed: dict[str, Any] = {"weights": None}
    kind = inspect.signature(builder).return_annotation
    if not isinstance(kind, type):
        return None, fixed
    parameters = inspect.signature(kind).parameters
    takes = {
        argument: object
        for argument, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and _is_plain(parameter.annotation)
    } | dict.fromkeys(_OF_THE_BUILDER.get(key, ()), object)
    defaults = {"aux_logits": False, "init_weights": True}
    return takes, fixed | {each: defaults[each] for each in defaults.keys() & takes.keys()}


def _of_segmenter(builder: Callable[..., nn.Module]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return what the builder of a segmentation model takes, and what is fixed of it."""
    parameters = inspect.signature(builder).parameters
    takes = {
        argument: object
        for argument, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and argument not in _DOWNLOADS
    }
    return takes, {"weights": None, "weights_backbone": None}


def _builders() -> tuple[_Builders, _Builders]:
    """Return torchvision's builders of image classifiers, and of segmentation models, by name."""
    with torch.device("cpu"):  # a model may be asked for without memory, this module must be real
        from torchvision import models

    classifiers, segmenters = (
        {name: models.get_model_builder(name) for name in models.list_models(module=module)}
        for module in (models, models.segmentation)
    )
    return classifiers, segmenters


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
