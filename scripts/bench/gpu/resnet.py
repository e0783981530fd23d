"""Training steps of a ResNet-50 in bfloat16, of which only the normalization differs."""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import resnet50

import syncbn
from scripts.bench.gpu.chain import Chain, exchanging_with_itself
from scripts.bench.gpu.run import Run
from scripts.bench.measure import Rows
from scripts.bench.train.models import resnet18

_BATCHES, _TURNS, _STEPS = [128, 32], 7, 3


def bench_resnet(run: Run) -> Rows:
    """Time whole steps, with the optimizer's, of each batch."""
    rows: Rows = []
    for batch in run.until_late([2] if run.tiny else _BATCHES):
        side = 16 if run.tiny else 224
        images = torch.randn(batch, 3, side, side, device=run.device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (batch,), device=run.device)
        steps: dict[str, Callable[[], None]] = {}
        for name, model in _models(run.tiny).items():
            model.to(run.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch's annotation leaves the format out
            steps[name] = _step(model, images, labels, itself="exchanged" in name)
        taken = _take_turns(run, steps)
        row: dict[str, Any] = {"model": "ResNet-18" if run.tiny else "ResNet-50", "batch": batch}
        row |= {f"{name} ms": time_s * 1e3 for name, time_s in taken.items()}
        row["/ chain"] = taken["fused, exchanged"] / taken["chain"]
        row["/ BatchNorm2d"] = taken["fused"] / taken["nn.BatchNorm2d"]
        rows.append(row)
    return rows


def _models(tiny: bool) -> dict[str, nn.Module]:
    def model(norm: type[nn.Module]) -> nn.Module:
        return resnet18(8, norm) if tiny else resnet50(norm_layer=norm)  # pyright: ignore[reportArgumentType] -- a class is such a function

    return {
        "nn.BatchNorm2d": model(nn.BatchNorm2d),
        "chain": model(Chain),
        "ours": model(syncbn.SyncBatchNorm),
        "fused": syncbn.fuse(model(syncbn.SyncBatchNorm)).model,
        "fused, exchanged": syncbn.fuse(model(syncbn.SyncBatchNorm)).model,
    }


def _step(model: nn.Module, images: Tensor, labels: Tensor, itself: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with exchanging_with_itself() if itself else nullcontext():
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    return step


def _take_turns(run: Run, steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return median times of a step in seconds, launched by the host as in training."""
    warm, turns, number = (0, 1, 1) if run.tiny else (3, _TURNS, _STEPS)
    for step, _ in itertools.product(steps.values(), range(warm)):
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(turns), steps.items()):
        _wait(run.device)
        start = time.perf_counter()
        for _ in range(number):
            step()
        _wait(run.device)
        times[name].append((time.perf_counter() - start) / number)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
