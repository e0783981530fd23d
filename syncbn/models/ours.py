"""Our own small image classifiers."""

from torch import nn


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
