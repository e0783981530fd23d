"""Factories of small models that answer other things than classes, to be named by import path."""

import torch
from torch import Tensor, nn

SEGMENTER = "tests.support.networks:segmenter"
VECTORS = "tests.support.networks:vectors"
MASKED = "tests.support.networks:masked"
MIXED = "tests.support.networks:mixed"


def segmenter(in_channels: int, num_classes: int, width: int = 4) -> nn.Module:
    """Return a model from images (N, in_channels, H, W) to logits (N, num_classes, H, W)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, num_classes, 1),
    )


def vectors(in_channels: int, num_classes: int) -> nn.Module:
    """Return a model that turns images (N, in_channels, H, W) into vectors (N, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
        nn.Tanh(),
    )


class _Masked(nn.Module):
    """Adds a mask of 0 and −∞ to its logits, as attention does."""

    mask: Tensor

    def __init__(self, in_channels: int, num_classes: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(in_channels, num_classes)
        self.register_buffer(
            "mask", torch.tensor([0.0, -torch.inf]).repeat(num_classes)[:num_classes]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mean(self.dim)) + self.mask


def masked(in_channels: int, num_classes: int, dim: int = -1) -> nn.Module:
    """Return a classifier with a buffer that holds −∞."""
    return _Masked(in_channels, num_classes, dim)


class _Mixed(nn.Module):
    """What each image gets depends on the others."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def mixed(in_channels: int, num_classes: int) -> nn.Module:
    """Return a segmentation whose answers depend on the batch."""
    return _Mixed(in_channels, num_classes)
