"""The models that are trained: a ResNet-18 for small images, and a layer to compare with."""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *args: Any)
        total = vector.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class Naive(nn.BatchNorm2d):
    """What one writes in ten minutes: E[x²] − E[x]², and autograd through an all-reduce."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input (N, C, H, W), normalized over all ranks."""
        moments = torch.cat([input.mean((0, 2, 3)), input.square().mean((0, 2, 3))])
        total: Tensor = _Sum.apply(moments)  # pyright: ignore[reportAssignmentType] -- torch types Function.apply as Any or None
        mean, square = (total / dist.get_world_size()).chunk(2)
        variance = square - mean.square()
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(variance, 0.1)
        scale = (variance + self.eps).rsqrt() * self.weight
        column = (1, -1, 1, 1)
        return (input - mean.view(column)) * scale.view(column) + self.bias.view(column)


def resnet18(
    width: int = 64,
    norm: type[nn.Module] = nn.BatchNorm2d,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return a ResNet-18 for images of 32×32 pixels, whose first stage has `width` channels."""

    def block(channels: int, out_channels: int, stride: int) -> nn.Module:
        downsample = None
        if stride != 1 or channels != out_channels:
            convolution = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            downsample = nn.Sequential(convolution, norm(out_channels))
        return BasicBlock(channels, out_channels, stride, downsample, norm_layer=norm)  # pyright: ignore[reportArgumentType] -- a class is such a function

    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    for stage, (channels, out_channels) in enumerate(itertools.pairwise(widths)):
        blocks += [
            block(channels, out_channels, 2 if stage else 1),
            block(out_channels, out_channels, 1),
        ]
    return nn.Sequential(
        *(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm(width)),
        nn.ReLU(inplace=True),
        *(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes)),
    )
