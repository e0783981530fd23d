"""Architectures by name: what a configuration or a bundle may ask for."""

import difflib
import importlib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from syncbn.errors import ModelError
from syncbn.layers.whitening import SyncWhitening

Norm = Literal["batch", "whitening", "none"]

_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
_COMMON: Mapping[str, Any] = {
    "in_channels": int,
    "num_classes": int,
    "norm": Norm,
    "eps": float,
    "momentum": float,
    "whitening_group_size": int,
    "whitening_method": Literal["zca", "newton"],
    "whitening_iterations": int,
    "whitening_shrinkage": float,
}
_SMALL = 256  # values
_TORCHVISION = "torchvision."
_DOWNLOADS = ("weights", "weights_backbone", "progress", "pretrained", "pretrained_backbone")
# What a builder reads itself, before a model whose constructor swallows any argument.
_OF_THE_BUILDER: Mapping[str, tuple[str, ...]] = {
    "mobilenet_v3_large": ("width_mult", "reduced_tail", "dilated"),
    "mobilenet_v3_small": ("width_mult", "reduced_tail", "dilated"),
}


def cnn(in_channels: int, num_classes: int, width: int = 32) -> nn.Module:
    """Return a small image classifier: four convolution → BN → ReLU, pooling, one linear layer.

    Two of the convolutions halve the image, so any size from 4×4 pixels up will do. The
    convolutions have no bias, which the BN after them would cancel.

    Args:
        in_channels: channels of the input images, shape (N, in_channels, H, W).
        num_classes: logits per image; the output has shape (N, num_classes).
        width: channels of the first convolution; the others have twice as many.
    """
    blocks: list[nn.Module] = []
    channels = in_channels
    for out_channels, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2)):
        blocks.append(nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False))
        blocks.extend((nn.BatchNorm2d(out_channels), nn.ReLU()))
        channels = out_channels
    return nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )


def mlp(
    in_channels: int, num_classes: int, size: int = 8, width: int = 64, depth: int = 8
) -> nn.Module:
    """Return a multilayer perceptron: linear → BN → ReLU, depth times, and one linear layer.

    The linear layers before BN have no bias, which it would cancel. Their weights are normal with
    variance 2/fan_in, which keeps the size of what passes a ReLU, so that the perceptron can learn
    without BN too (He et al., "Delving Deep into Rectifiers", 2015, equation 10); with torch's
    default, each layer would shrink it by √6.

    Args:
        in_channels: channels of the input images, shape (N, in_channels, H, W).
        num_classes: logits per image; the output has shape (N, num_classes).
        size: height and width to which images are averaged first, in pixels.
        width: units of each hidden layer.
        depth: hidden layers.
    """
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(size), nn.Flatten()]
    features = in_channels * size**2
    for _ in range(depth):
        linear = nn.Linear(features, width, bias=False)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers.extend((linear, nn.BatchNorm1d(width), nn.ReLU()))
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"cnn": cnn, "mlp": mlp}


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


def model_names() -> tuple[str, ...]:
    """Return every name that needs no import path; torchvision's only where it is installed."""
    try:
        return (*ARCHITECTURES, *(_TORCHVISION + name for name in _torchvision_builders()))
    except ImportError:
        return tuple(ARCHITECTURES)


def build_model(
    name: str, arguments: Mapping[str, Any], *, allow_imports: bool = False
) -> nn.Module:
    """Return a freshly initialized model.

    Every architecture takes in_channels and num_classes, which it needs, and norm, eps and
    momentum. norm="batch", the default, keeps the model's batch normalizations as nn.BatchNorm,
    to be converted where they shall synchronize, and sets eps and momentum on all of them where
    given. norm="none" puts a `ChannelAffine` in the place of each, and norm="whitening" a
    `SyncWhitening`, whose arguments are whitening_method, whitening_iterations,
    whitening_shrinkage, and whitening_group_size, the most channels that are whitened together.

    Args:
        name: a key of `ARCHITECTURES`; `torchvision.` and the name of an image classifier of
            `torchvision.models`, made without pretrained weights and for any number of channels;
            or `package.module:factory`, a function that is called with in_channels, num_classes
            and the other arguments as keywords, and returns a module.
        arguments: the arguments above, and those of the architecture: booleans, numbers, strings
            and lists of these. Each must have the annotated type where the architecture is ours.
        allow_imports: whether to accept an import path. It runs that code, so allow it only where
            the name comes from the command line, or from a file that the user trusts.

    Raises:
        ModelError: the name is unknown, or an import path that is not allowed or cannot be
            imported; an argument is unknown, missing, or of another type; the architecture
            refuses its arguments, makes no module, or makes one with parameters of no shape yet,
            or with batch normalization that cannot be left out.
    """
    if ":" in name:
        factory, takes = _imported(name, allow_imports), None
    elif name.startswith(_TORCHVISION):
        factory, takes = _torchvision(name, arguments)
    elif name in ARCHITECTURES:
        factory = ARCHITECTURES[name]
        parameters = inspect.signature(factory).parameters
        takes = {key: parameter.annotation for key, parameter in parameters.items()}
    else:
        raise _unknown(name, tuple(ARCHITECTURES))
    _check_arguments(name, arguments, takes)
    shared = _COMMON.keys() - {"in_channels", "num_classes"}
    own = {key: arguments[key] for key in arguments if key not in shared}
    try:
        model = factory(**own)
    except Exception as error:  # whatever a constructor makes of its arguments
        raise ModelError(
            f"architecture {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"architecture {name!r} made a {type(model).__name__}, not a module")
    lazy = [key for key, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"architecture {name!r} leaves the shape of {', '.join(lazy)} open; give its layers "
            "their sizes, or run it once in the factory"
        )
    if arguments.get("norm") == "none":
        return _exchange_normalization(name, model, "none", ChannelAffine)
    if arguments.get("norm") == "whitening":
        make = partial(_whitening, arguments=arguments)
        return _exchange_normalization(name, model, "whitening", make)
    for module in model.modules():
        if isinstance(module, _BASE):
            module.eps = arguments.get("eps", module.eps)
            module.momentum = arguments.get("momentum", module.momentum)
    return model


def build_without_memory(
    name: str, arguments: Mapping[str, Any], *, allow_imports: bool = False
) -> nn.Module:
    """Return a model whose tensors have shapes and no values: on torch's meta device.

    Args:
        name: as for `build_model`.
        arguments: as for `build_model`.
        allow_imports: as for `build_model`.

    Raises:
        ModelError: as `build_model`; also where the architecture reads what is in large tensors.
    """

    def build() -> nn.Module:
        with torch.device("meta"):
            return build_model(name, arguments, allow_imports=allow_imports)

    try:
        return build()
    except ModelError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    # Some compute the sizes of their layers with tensors, and read them there.
    with _SmallTensorsAreReal():
        return build().to("meta")


class _SmallTensorsAreReal(TorchFunctionMode):
    """Lets code inside `torch.device("meta")` read the values of small tensors that it makes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func in (torch.arange, torch.linspace, torch.tensor) and result.numel() <= _SMALL:
            return func(*args, **(given | {"device": "cpu"}))
        return result


def _unknown(name: str, known: tuple[str, ...]) -> ModelError:
    close = " or ".join(map(repr, difflib.get_close_matches(name, known)))
    return ModelError(
        f"unknown architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}, "
        "torchvision.NAME or package.module:factory" + (f"; did you mean {close}?" if close else "")
    )


def _imported(name: str, allow_imports: bool) -> Callable[..., object]:
    """Return what an import path names, after importing its module."""
    if not allow_imports:
        raise ModelError(
            f"architecture {name!r} is an import path, which is refused because building it would "
            "run that code; if you trust it and whoever named it, allow imports (--allow-imports)"
        )
    module, _, attribute = name.partition(":")
    try:
        # A model may be asked for without memory; tensors of its module must be real all the same.
        with torch.device("cpu"):
            return operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # a module may raise anything while it is imported
        raise ModelError(
            f"architecture {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _torchvision_builders() -> Mapping[str, Callable[..., nn.Module]]:
    """Return torchvision's builders of image classifiers, by name."""
    with torch.device("cpu"):  # as in _imported
        from torchvision import models

    return {name: models.get_model_builder(name) for name in models.list_models(module=models)}


def _torchvision(
    name: str, arguments: Mapping[str, Any]
) -> tuple[Callable[..., nn.Module], Mapping[str, Any] | None]:
    """Return a factory of one of torchvision's classifiers, and what it takes, if that shows."""
    try:
        builders = _torchvision_builders()
    except ImportError as error:
        raise ModelError(f"architecture {name!r} needs torchvision: {error}") from error
    key = name.removeprefix(_TORCHVISION)
    if key not in builders:
        raise _unknown(name, tuple(_TORCHVISION + known for known in builders))
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
    builder = builders[key]
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

    def factory(in_channels: int, **others: Any) -> nn.Module:
        model = builder(**(fixed | others))
        if in_channels != 3:
            _set_in_channels(model, in_channels)
        return model

    return factory, takes


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


def _exchange_normalization(
    name: str, model: nn.Module, norm: Norm, make: Callable[[_BASE], nn.Module]
) -> nn.Module:
    """Put what is made of it in the place of every batch normalization."""
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


def _whitening(layer: _BASE, arguments: Mapping[str, Any]) -> SyncWhitening:
    """Return what whitens in the place of a batch normalization, with its parameters."""
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


def _check_arguments(
    name: str, arguments: Mapping[str, Any], takes: Mapping[str, Any] | None
) -> None:
    """Raise unless arguments fit an architecture; None for `takes` means any name."""
    expected = dict(takes or {}) | dict(_COMMON)
    for key, value in arguments.items():
        if takes is not None and key not in expected:
            raise ModelError(
                f"architecture {name!r} takes no argument {key!r}; it takes {', '.join(expected)}"
            )
        _check_argument(name, key, value, expected.get(key, object))
    missing = [key for key in ("in_channels", "num_classes") if key not in arguments]
    if missing:
        raise ModelError(f"architecture {name!r} needs {', '.join(missing)}")


def _check_argument(name: str, key: str, value: object, expected: Any) -> None:
    """Raise unless a value fits.

    Args:
        name: of the architecture.
        key: of the argument.
        value: what was given.
        expected: int (positive), float (not negative), a Literal, or object for what a
            configuration can state.
    """
    where = f"argument {key!r} of architecture {name!r}"
    if expected is object:
        items: list[object] = value if isinstance(value, list) else [value]
        if not all(isinstance(item, bool | int | float | str) for item in items):
            raise ModelError(
                f"{where} must be a boolean, a number, a string or a list of these, got {value!r}"
            )
    elif choices := get_args(expected):
        if value not in choices:
            raise ModelError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int if expected is int else int | float):
        raise ModelError(f"{where} must be of type {expected.__name__}, got {value!r}")
    elif expected is int and value < 1:
        raise ModelError(f"{where} must be positive, got {value!r}")
    elif expected is float and not 0 <= value < math.inf:
        raise ModelError(f"{where} must be 0 or more, and finite, got {value!r}")
