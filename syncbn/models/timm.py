"""timm's image classifiers by name, and U-Nets with timm's models for encoders."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.errors import ModelError
from syncbn.models.unet import UNet

PREFIX = "timm."
UNET_PREFIX = "unet.timm."

# What would load weights, or something else than a classifier.
_REFUSED = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("checkpoint_path", "cache_dir", "features_only", "out_indices"),
)
_UNET: Mapping[str, Any] = {"width": int, "depth": int}


def known(name: str) -> tuple[str, ...]:
    """Return every name that `factory` takes and that has the prefix of one that was asked for.

    Raises:
        ModelError: timm is not installed.
    """
    prefix = UNET_PREFIX if name.startswith(UNET_PREFIX) else PREFIX
    return tuple(prefix + each for each in _timm(name).list_models())


def factory(
    name: str, arguments: Mapping[str, Any]
) -> tuple[Callable[..., nn.Module], Mapping[str, Any] | None]:
    """Return a factory of one of timm's models or a U-Net on it, and what it takes, if it shows.

    Args:
        name: one of `known`.
        arguments: what it will be called with.

    Raises:
        ModelError: an argument would load weights, or make it return something else than logits.
    """
    timm = _timm(name)
    if name.startswith(UNET_PREFIX):
        key = name.removeprefix(UNET_PREFIX)
        return lambda **given: _unet(timm, key, **given), _UNET
    for argument in arguments:
        if argument in _REFUSED:
            raise ModelError(
                f"architecture {name!r} takes no argument {argument!r} here: it is a classifier "
                "that starts from random weights"
            )
    key = name.removeprefix(PREFIX)

    def make(in_channels: int, num_classes: int, **others: Any) -> nn.Module:
        return timm.create_model(
            key, pretrained=False, in_chans=in_channels, num_classes=num_classes, **others
        )

    return make, None


class Features(nn.Module):
    """The features of one of timm's models, the channels always on the second axis.

    Its state dict has the names of timm's model.

    Args:
        model: made by timm with features_only=True.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._is_channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return features (N, C, H, W), the largest first, of images (N, in_channels, H, W)."""
        features: list[Tensor] = self.model(x)
        if self._is_channels_last:
            return [feature.permute(0, 3, 1, 2) for feature in features]
        return features


def _unet(
    timm: Any, key: str, in_channels: int, num_classes: int, width: int = 32, depth: int = 4
) -> UNet:
    """Return a U-Net of which the encoder is the first levels of one of timm's models.

    Args:
        timm: the package.
        key: the model's name there.
        in_channels: channels of the input images, shape (N, in_channels, H, W).
        num_classes: logits per pixel; the output has shape (N, num_classes, H, W).
        width: channels of the decoder at the largest level; below, twice as many each.
        depth: how many of the encoder's levels are taken.
    """
    encoder = timm.create_model(
        key,
        pretrained=False,
        in_chans=in_channels,
        features_only=True,
        out_indices=tuple(range(depth)),
    )
    channels = [width * 2**level for level in range(depth)]
    return UNet(Features(encoder), encoder.feature_info.channels(), channels, num_classes)


def _timm(name: str) -> Any:
    """Return the package."""
    try:
        with torch.device("cpu"):  # a model may be asked for without memory, timm must be real
            import timm
    except ImportError as error:
        raise ModelError(
            f"architecture {name!r} needs timm ({error}); pip install 'syncbn[timm]'"
        ) from error
    return timm
