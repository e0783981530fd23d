"""Two ranks that share one GPU: whether they compute what one would, and how long a step takes."""

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import syncbn
from scripts.bench.gpu.interpreted import interpreting_quickly
from scripts.bench.gpu.run import Run
from scripts.bench.measure import Rows

# What lets NCCL, from 2.30 on, have two ranks on one GPU.
_SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
_SHAPE, _TINY_SHAPE = (64, 256, 28, 28), (4, 6, 5, 4)
_TURNS = 20
_LIMIT_S = 90
_COLUMNS = "backend", "error of y", "error of dx", "ms", "SyncBatchNorm ms", "outcome"


def bench_ranks(run: Run) -> Rows:
    """Take a step on two ranks of each backend; a backend that refuses has a row that says so."""
    os.environ |= _SHARING
    rows: Rows = []
    for backend in run.until_late(["gloo"] if run.tiny else ["gloo", "nccl"]):
        with tempfile.TemporaryDirectory() as directory:
            try:
                _spawn(run, backend, directory)
                rows.append(json.loads((Path(directory) / "row.json").read_text()))
            except Exception as error:  # each backend fails in its own way
                lines = str(error).strip().splitlines() or [type(error).__name__]
                print(f"{backend}: {error}", file=sys.stderr)
                rows.append(dict.fromkeys(_COLUMNS, "") | {"backend": backend})
                rows[-1]["outcome"] = lines[-1][:80]
    return rows


def _spawn(run: Run, backend: str, directory: str) -> None:
    """Run both ranks; end them if they take too long.

    Raises:
        TimeoutError: they did.
    """
    context: Any = spawn(
        _be_rank, (backend, run.device.type, directory), nprocs=2, join=False, daemon=True
    )
    deadline = time.monotonic() + _LIMIT_S
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready after {_LIMIT_S} s")
    finally:
        for process in context.processes:
            process.kill()


def _be_rank(rank: int, backend: str, device_type: str, directory: str) -> None:
    torch.set_num_threads(1)
    if device_type == "cpu":
        with interpreting_quickly():
            _compare(rank, backend, torch.device("cpu"), directory)
    else:
        torch.cuda.set_device(0)
        _compare(rank, backend, torch.device("cuda", 0), directory)


def _compare(rank: int, backend: str, device: torch.device, directory: str) -> None:
    tiny = device.type == "cpu"
    dist.init_process_group(
        backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_LIMIT_S / 2),
    )
    torch.manual_seed(0)  # the same on both
    x, dy = (torch.randn(_TINY_SHAPE if tiny else _SHAPE, device=device) for _ in range(2))
    expected = _step(nn.BatchNorm2d(x.shape[1], device=device).double(), x.double(), dy.double())
    mine = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    layer = syncbn.SyncBatchNorm(x.shape[1], device=device)
    errors = [
        ((result.double() - whole[mine]).abs().max() / whole.abs().max()).item()
        for result, whole in zip(_step(layer, x[mine], dy[mine]), expected, strict=True)
    ]
    row: dict[str, Any] = {"backend": backend}
    row |= {"error of y": f"{errors[0]:.0e}", "error of dx": f"{errors[1]:.0e}"}
    row["ms"] = _median_s(layer, x[mine], dy[mine], 2 if tiny else _TURNS) * 1e3
    row["SyncBatchNorm ms"] = ""
    if not tiny:  # torch's refuses the CPU
        theirs = nn.SyncBatchNorm(x.shape[1], device=device)
        row["SyncBatchNorm ms"] = _median_s(theirs, x[mine], dy[mine], _TURNS) * 1e3
    row["outcome"] = "right" if max(errors) < 1e-5 else "wrong"
    if rank == 0:
        (Path(directory) / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def _median_s(layer: nn.Module, x: Tensor, dy: Tensor, turns: int) -> float:
    times: list[float] = []
    for _ in range(turns):
        start = time.perf_counter()
        _step(layer, x, dy)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
