"""What one step really gives the GPU to do, seen by the profiler, and what the host has to do."""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.bench.gpu.cases import VARIANTS, Case, steps
from scripts.bench.gpu.run import Run
from scripts.bench.measure import Rows


def observe_launches(run: Run) -> Rows:
    """Count kernels, copies and fills of one step of each layer, the exchange sending nothing.

    Also say whether the host waits for the GPU, and how long it takes to launch all that.

    On the CPU, where there are none, torch's operations stand in.
    """
    rows: Rows = []
    shape = (2, 6, 5, 5) if run.tiny else (32, 256, 56, 56)
    for variant in run.until_late(VARIANTS):
        case = Case(shape, "bfloat16", "channels_last", variant)
        row: dict[str, Any] = {"variant": variant}
        for name, step in steps(case, run.device, 0).items():
            step(0)
            row[name] = _launches(run.device, step)
            row[f"{name} waits"] = _waits(run.device, step)
        small = Case((2, 6, 5, 5), "bfloat16", "channels_last", variant)
        for name, step in steps(small, run.device, 0).items():
            row[f"{name} host µs"] = _host_s(run.device, step) * 1e6
        rows.append(row)
    return rows


def _launches(device: torch.device, step: Any) -> int:
    kind, activity = "CPU", ProfilerActivity.CPU
    if device.type == "cuda":
        kind, activity = "CUDA", ProfilerActivity.CUDA
        torch.cuda.synchronize(device)
    with profile(activities=[activity]) as observed:
        step(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return sum(event.device_type.name == kind for event in observed.events() or [])


def _waits(device: torch.device, step: Any) -> str:
    if device.type != "cuda":
        return "unknown"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(0)
    except RuntimeError:
        return "yes"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def _host_s(device: torch.device, step: Any) -> float:
    """Return the time of a step that is so small that the GPU waits for the host."""
    number = 200 if device.type == "cuda" else 1
    step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / number
