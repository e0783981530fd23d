"""How long a device takes for each of several competitors, which take turns within one run."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

# Long beside what starting a graph takes.
_CALLS, _TURNS = 8, 9
# The L2 cache of an H200, where torch does not say.
_CACHE_BYTES = 60 << 20


def cache_bytes(device: torch.device) -> int:
    """Return how many bytes of tensors leave nothing of an earlier turn in a device's cache."""
    if device.type != "cuda":
        return 0
    return 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _CACHE_BYTES)


def take_turns(
    device: torch.device, competitors: dict[str, Callable[[int], Any]], sets: int
) -> tuple[dict[str, float], str]:
    """Return each one's median time in seconds, and how it was taken: graph, eager or host.

    On a GPU, calls are captured into a CUDA graph and replayed, so that the host's time does not
    count, or, if that is impossible, called.

    Args:
        device: that is measured.
        competitors: each does its work on the i-th of its inputs.
        sets: how many inputs there are.
    """
    if device.type != "cuda":
        return {name: _host_s(work) for name, work in competitors.items()}, "host"
    calls = sets * -(-_CALLS // sets)
    try:
        replays = {name: _captured(work, calls) for name, work in competitors.items()}
        how = "graph"
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize(device)
        replays = {name: _repeated(work, calls) for name, work in competitors.items()}
        how = "eager"
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(_TURNS + 1):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn:  # the first one warms up
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: statistics.median(taken) for name, taken in times.items()}, how


def _captured(work: Callable[[int], Any], calls: int) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            work(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i)
    return graph.replay


def _repeated(work: Callable[[int], Any], calls: int) -> Callable[[], Any]:
    def repeat() -> None:
        for i in range(calls):
            work(i)

    return repeat


def _host_s(work: Callable[[int], Any]) -> float:
    start = time.perf_counter()
    work(0)
    return time.perf_counter() - start
