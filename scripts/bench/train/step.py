"""Steps of a ResNet-18 of which only the normalization differs."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import syncbn
from scripts.bench.measure import Rows, progress, take_turns
from scripts.bench.train.models import Naive, resnet18

WIDTHS = [16, 64]
IMAGES = [8, 32]


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()

    return step


def bench_steps(turns: int) -> Rows:
    """Training steps of each width and number of images."""
    rows: Rows = []
    for width, number in itertools.product(WIDTHS, IMAGES):
        images, labels = torch.randn(number, 3, 32, 32), torch.randint(10, (number,))
        models = {
            "nn.BatchNorm2d": resnet18(width, nn.BatchNorm2d),
            "SyncBatchNorm": resnet18(width, syncbn.SyncBatchNorm),
            "fused": syncbn.fuse(resnet18(width, syncbn.SyncBatchNorm)).model,
            "naive": resnet18(width, Naive),
        }
        taken = take_turns({n: _step(model, images, labels) for n, model in models.items()}, turns)
        row: dict[str, Any] = {"W": dist.get_world_size(), "width": width, "images": number}
        row |= {f"{name} ms": time_s * 1e3 for name, time_s in taken.items()}
        plain_s = taken.pop("nn.BatchNorm2d")
        rows.append(row | {f"{name} ratio": time_s / plain_s for name, time_s in taken.items()})
        progress(rows[-1])
    return rows
