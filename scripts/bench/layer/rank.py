"""A rank of any checkout: times steps of one layer whenever its standard input asks for some.

against.py starts it by its path, with the checkout on PYTHONPATH. So it imports nothing from
scripts, which are this checkout's, and uses of syncbn only what every version has: the layer.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn


def main() -> None:
    """Answer each line with a line: a new input with 0, a name and a number with seconds a step."""
    checkout, store, rank, world_size = sys.argv[1:]
    if not Path(syncbn.__file__).resolve().is_relative_to(Path(checkout).resolve()):
        sys.exit(f"{checkout} has no syncbn: it was found in {syncbn.__file__}")
    torch.set_num_threads(1)
    torch.manual_seed(int(rank))
    # Long enough for the other checkout to take all of its turns meanwhile.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(minutes=10),
    )
    x = dy = torch.empty(0)
    layers: dict[str, nn.Module] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "shape" in question:
            x, dy = (_input(question) for _ in range(2))
            x.requires_grad_()
            channels = x.shape[1]
            layers = {
                "torch": nn.BatchNorm2d(channels),
                "syncbn": syncbn.SyncBatchNorm(channels),
            }
            answer = 0.0
        else:
            answer = _seconds(layers[question["layer"]], x, dy, question["steps"])
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


def _input(case: dict[str, Any]) -> Tensor:
    x = torch.randn(case["shape"]).to(getattr(torch, case["dtype"]))
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return x.contiguous(memory_format=layout[case["layout"]])


def _seconds(layer: nn.Module, x: Tensor, dy: Tensor, steps: int) -> float:
    """Return the seconds of a forward and backward; the first, after the rest, is not counted.

    A rank that is alone waits for nobody: its processor time is the time of a step, whatever else
    the machine does meanwhile.
    """
    clock = time.process_time if dist.get_world_size() == 1 else time.perf_counter
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            dist.barrier()
            start = clock()
        x.grad = None
        layer(x).backward(dy)
    return (clock() - start) / steps


if __name__ == "__main__":
    main()
