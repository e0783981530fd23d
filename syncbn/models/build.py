"""Models by name: what a configuration or a bundle may ask for."""

import difflib
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from syncbn.errors import ModelError
from syncbn.models import timm, torchvision
from syncbn.models.arguments import COMMON, check_arguments
from syncbn.models.normalization import (
    ChannelAffine,
    exchange_normalization,
    make_whitening,
    set_normalization,
)
from syncbn.models.ours import cnn, mlp
from syncbn.models.unet import unet

ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"cnn": cnn, "mlp": mlp, "unet": unet}

_SMALL = 256  # values


def model_names() -> tuple[str, ...]:
    """Return every name of ours, and torchvision's if it is installed; timm has its own list."""
    try:
        return (*ARCHITECTURES, *torchvision.names())
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
            `torchvision.models` or a model of `torchvision.models.segmentation`, made without
            pretrained weights and for any number of channels, the latter a `Segmenter`; `timm.`
            and the name of one of timm's classifiers; `unet.timm.` and such a name, a U-Net whose
            encoder is the first `depth` levels of that model;
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
    elif name.startswith(torchvision.PREFIX):
        if name not in (known := torchvision.known(name)):
            raise _unknown(name, known)
        factory, takes = torchvision.factory(name, arguments)
    elif name.startswith((timm.PREFIX, timm.UNET_PREFIX)):
        if name not in (known := timm.known(name)):
            raise _unknown(name, known)
        factory, takes = timm.factory(name, arguments)
    elif name in ARCHITECTURES:
        factory = ARCHITECTURES[name]
        parameters = inspect.signature(factory).parameters
        takes = {key: parameter.annotation for key, parameter in parameters.items()}
    else:
        raise _unknown(name, tuple(ARCHITECTURES))
    check_arguments(name, arguments, takes)
    shared = COMMON.keys() - {"in_channels", "num_classes"}
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
        return exchange_normalization(name, model, "none", ChannelAffine)
    if arguments.get("norm") == "whitening":
        make = partial(make_whitening, arguments=arguments)
        return exchange_normalization(name, model, "whitening", make)
    set_normalization(model, arguments)
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
        "torchvision.NAME, timm.NAME, unet.timm.NAME or package.module:factory"
        + (f"; did you mean {close}?" if close else "")
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
