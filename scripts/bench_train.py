"""Time a training step of ResNet-18 with synchronised layers beside one with torch's own.

python scripts/bench_train.py                  prints the table
python scripts/bench_train.py --json FILE      also writes the figures
python scripts/bench_train.py --write          also puts the table into docs/performance.md

One rank, and two ranks, of one thread each train under DistributedDataParallel: forward, backward,
SGD. Only the normalization differs, and all take turns within one run; a figure is the median over
the turns.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from document import write_table
from measure import Rows, machine, measured_on, on_ranks, progress, table, take_turns
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock

import syncbn

WIDTHS = [16, 64]
IMAGES = [8, 32]
TURNS = 15


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


class _Naive(nn.BatchNorm2d):
    """What one writes in ten minutes: E[x²] − E[x]², and autograd through an all-reduce."""

    def forward(self, input: Tensor) -> Tensor:
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


def resnet18(width: int, norm: type[nn.Module]) -> nn.Module:
    """Return a ResNet-18 for images of 32×32 pixels, whose first stage has `width` channels."""

    def block(channels: int, out_channels: int, stride: int) -> BasicBlock:
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
        *(nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)),
        *(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)),
    )


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
            "naive": resnet18(width, _Naive),
        }
        taken = take_turns({n: _step(model, images, labels) for n, model in models.items()}, turns)
        row: dict[str, Any] = {"W": dist.get_world_size(), "width": width, "images": number}
        row |= {f"{name} ms": time_s * 1e3 for name, time_s in taken.items()}
        plain_s = taken.pop("nn.BatchNorm2d")
        rows.append(row | {f"{name} ratio": time_s / plain_s for name, time_s in taken.items()})
        progress(rows[-1])
    return rows


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in figures["machine"].items()), sep="\n")
    rows = [row for size in (1, 2) for row in on_ranks(size, bench_steps, arguments.turns)]
    figures["train"] = rows
    worst = {
        name: max(row[f"{name} ratio"] for row in rows if row["W"] == 2)
        for name in ("SyncBatchNorm", "fused")
    }
    text = (
        f"{table(rows)}\n\nRatios are over nn.BatchNorm2d; the bar at W = 2 is 1.0. The worst: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items())
        + f".\n\n{measured_on(figures['machine'], arguments.turns)}"
    )
    print(f"\n{text}")
    if arguments.write:
        write_table("performance.md", "bench_train.py", text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
