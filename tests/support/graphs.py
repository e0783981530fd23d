"""What torch.compile makes of the layer on a GPU that is not here; prints JSON, for a test.

python -m tests.support.graphs WORLD_SIZE DYNAMIC

In a process of its own: it replaces what Triton and torch ask of a GPU.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncbn
from scripts.dev.compile_kernels import Driver


def _targets(graph: torch.fx.GraphModule) -> list[str]:
    """Return what a graph calls, and the graphs that it holds."""
    return [
        str(node.target)
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def main(world_size: int, dynamic: bool) -> dict[str, list[str]]:
    """Return what the layer's graphs call, as Dynamo records them, and for the compiler."""
    drivers: Any = triton.runtime.driver
    drivers.set_active(Driver("sm_90"))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue] -- of a GPU
        multi_processor_count=132, warp_size=32
    )
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    recorded: list[str] = []
    compiled: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        recorded.extend(_targets(graph))
        return graph

    def compile_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.extend(_targets(graph))
        return graph

    backend = aot_autograd(fw_compiler=compile_forward)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer = syncbn.SyncBatchNorm(8, relu=True, device="cuda")
            x = torch.empty(4, 8, 6, 6, device="cuda", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=memory_format)
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)  # pyright: ignore[reportPrivateUsage] -- the documented name
            torch.compiler.reset()
            torch.compile(layer, fullgraph=True, backend=record)(x.requires_grad_())
            torch.compiler.reset()
            with torch.no_grad():  # a backward pass would start a GPU
                torch.compile(layer, fullgraph=True, backend=backend)(x.detach())
    return {"recorded": recorded, "compiled": compiled}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2] == "True")))  # noqa: T201 -- the answer
