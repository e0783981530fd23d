"""Architectures by name: what a configuration or a bundle may ask for."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from syncbn.errors import ModelError

Norm = Literal["batch", "none"]


def cnn(
    in_channels: int,
    num_classes: int,
    width: int = 32,
    norm: Norm = "batch",
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> nn.Module:
    """Return a small image classifier: four convolution → BN → ReLU, pooling, one linear layer.

    Two of the convolutions halve the image, so any size from 4×4 pixels up will do. The
    convolutions have no bias where a BN follows, which would cancel it.

    Args:
        in_channels: channels of the input images, shape (N, in_channels, H, W).
        num_classes: logits per image; the output has shape (N, num_classes).
        width: channels of the first convolution; the others have twice as many.
        norm: "batch" for `nn.BatchNorm2d`, to be converted where it shall synchronise; "none" for
            convolutions with a bias and nothing after them.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
    """
    blocks: list[nn.Module] = []
    channels = in_channels
    for out_channels, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2)):
        blocks.append(nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=norm == "none"))
        if norm == "batch":
            blocks.append(nn.BatchNorm2d(out_channels, eps, momentum))
        blocks.append(nn.ReLU())
        channels = out_channels
    return nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"cnn": cnn}


def build_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a freshly initialised model.

    Args:
        name: a key of `ARCHITECTURES`.
        arguments: keyword arguments of that function; each must have the annotated type.

    Raises:
        ModelError: the name is unknown; an argument is unknown, missing, or of another type.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"unknown architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    parameters = inspect.signature(architecture).parameters
    for key, value in arguments.items():
        if key not in parameters:
            raise ModelError(
                f"architecture {name!r} takes no argument {key!r}; it takes {', '.join(parameters)}"
            )
        _check_argument(name, key, value, parameters[key].annotation)
    missing = [
        key for key, p in parameters.items() if p.default is p.empty and key not in arguments
    ]
    if missing:
        raise ModelError(f"architecture {name!r} needs {', '.join(missing)}")
    return architecture(**arguments)


def _check_argument(name: str, key: str, value: object, expected: Any) -> None:
    """Raise unless value fits an annotation: int (positive), float (not negative), or a Literal."""
    where = f"argument {key!r} of architecture {name!r}"
    if choices := get_args(expected):
        if value not in choices:
            raise ModelError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int if expected is int else int | float):
        raise ModelError(f"{where} must be of type {expected.__name__}, got {value!r}")
    elif expected is int and value < 1:
        raise ModelError(f"{where} must be positive, got {value!r}")
    elif expected is float and not 0 <= value < math.inf:
        raise ModelError(f"{where} must be 0 or more, and finite, got {value!r}")
