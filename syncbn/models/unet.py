"""U-Nets, which give each pixel of an image its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def unet(in_channels: int, num_classes: int, width: int = 32, depth: int = 4) -> nn.Module:
    """Return a U-Net: an encoder that halves the image depth times, and a decoder that returns.

    Each level is two times convolution → BN → ReLU; the convolutions have no bias, which the BN
    would cancel. The decoder enlarges linearly to the size of what it is joined with, so images
    may have any size; where none is below 1, each halving rounds up.

    Args:
        in_channels: channels of the input images, shape (N, in_channels, H, W).
        num_classes: logits per pixel; the output has shape (N, num_classes, H, W).
        width: channels at full size; each level below has twice as many as the one above it.
        depth: how often the image is halved.

    Source: Ronneberger, Fischer and Brox, "U-Net" (2015), with padded convolutions and BN.
    """
    channels = [width * 2**level for level in range(depth + 1)]
    return UNet(Encoder(in_channels, channels), channels, channels, num_classes)


class UNet(nn.Module):
    """An encoder, and a decoder that joins what it gives from the smallest to the largest.

    Args:
        encoder: gives a list of features (N, C, H, W), the largest first.
        features: the channels of these.
        channels: those of the decoder at each of these levels but the smallest.
        num_classes: logits per pixel.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: Sequence[int],
        channels: Sequence[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        decoder: list[nn.Module] = []
        below = features[-1]
        for level in reversed(range(len(features) - 1)):
            decoder.append(level_of(below + features[level], channels[level]))
            below = channels[level]
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv2d(below, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes, H, W), of images (N, in_channels, H, W)."""
        *features, output = self.encoder(x)
        for level, feature in zip(self.decoder, reversed(features), strict=True):
            output = level(torch.cat([feature, resized(output, feature)], 1))
        return resized(self.head(output), x)


class Encoder(nn.Module):
    """Levels of two convolutions each, with the image halved between them.

    Args:
        in_channels: of the images.
        channels: of each level, the largest image first.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        before = [in_channels, *channels]
        self.levels = nn.ModuleList(map(level_of, before, channels))
        self.halve = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of each level for images (N, in_channels, H, W)."""
        features: list[Tensor] = []
        for level in self.levels:
            features.append(level(self.halve(features[-1]) if features else x))
        return features


def level_of(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two times convolution → BN → ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
        layers.extend((nn.BatchNorm2d(out_channels), nn.ReLU()))
    return nn.Sequential(*layers)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Return (N, C, *, *) linearly interpolated to the height and width of another."""
    return interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
