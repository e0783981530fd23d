"""The digits that the chapter's networks learn: training on them, and accuracies.

They are for sections 6 and 8 of docs/why.md, which the claims of claims.py need no data for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import syncbn


@dataclass(frozen=True)
class Digits:
    """Scaled images of scikit-learn's digits, (n, 64) float32, and their labels."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor


def split_digits() -> Digits:
    """Return the digits, four of five for training, in a fixed random order."""
    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(targets)[order]
    cut = len(labels) * 4 // 5
    return Digits(x[:cut], labels[:cut], x[cut:], labels[cut:])


def perceptron(place: str, width: int = 32, depth: int = 3) -> nn.Sequential:
    """Return linear layers and ReLU with batch normalization: before, after or nowhere (none)."""
    layers: list[nn.Module] = []
    features = 64
    for _ in range(depth):
        layers.append(nn.Linear(features, width, bias=place != "before"))
        norm = [] if place == "none" else [syncbn.SyncBatchNorm(width)]
        layers.extend([*norm, nn.ReLU()] if place == "before" else [nn.ReLU(), *norm])
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 10))


def train_on(
    data: Digits, model: nn.Module, seed: int, lr: float, epochs: int, batch_size: int = 32
) -> None:
    """Train a model by plain stochastic gradient descent with momentum 0.9."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x), generator=generator).split(batch_size):
            if len(batch) > 1:
                loss = functional.cross_entropy(model(data.x[batch]), data.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def accuracy(data: Digits, model: nn.Module) -> float:
    """Return the test accuracy, 0 to 1, from the running statistics."""
    model.eval()
    right = (model(data.test_x).argmax(1) == data.test_labels).double().mean().item()
    model.train()
    return right


@torch.no_grad()
def accuracy_by_batch(data: Digits, model: nn.Module, size: int, order: Tensor) -> float:
    """Return the test accuracy where each batch of `size` is normalized by its own statistics.

    Args:
        data: the digits.
        model: in training mode; a copy whose running statistics may move.
        size: samples in a batch; a divisor of how many there are, so that every sample counts.
        order: of the test samples.
    """
    batches = order.reshape(-1, size)
    right = [model(data.test_x[batch]).argmax(1) == data.test_labels[batch] for batch in batches]
    return torch.cat(right).double().mean().item()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std() / len(values) ** 0.5)
