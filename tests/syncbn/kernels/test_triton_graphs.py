"""torch.compile sees into the Triton kernels: one graph, without copies of large tensors."""

import json
import sys

import pytest

from tests.support.processes import REPOSITORY, run

KERNELS = ["moments", "normalize", "backward_reduce", "backward_input"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_layer_on_a_gpu_is_one_graph(world_size: int, dynamic: bool) -> None:
    command = [sys.executable, "-m", "tests.support.graphs", str(world_size), str(dynamic)]
    result = run(command, REPOSITORY, timeout_s=120)
    assert result.returncode == 0, result.stdout
    found = json.loads(result.stdout.splitlines()[-1])
    operators = [name for name in found["recorded"] if "syncbn" in name]
    kernels = [f"syncbn.triton_{kernel}.default" for kernel in KERNELS]
    exchanged = {"syncbn.gather", "syncbn.sum", "syncbn.triton_merge.default"}
    # Of two memory formats.
    assert [name for name in operators if name not in exchanged] == 2 * kernels
    assert len(operators) == 2 * (4 if world_size == 1 else 7)
    launches = [name for name in found["compiled"] if "triton_kernel_wrapper" in name]
    # Moments, coefficients and y; on several ranks a stamp, and the moments of all of them.
    assert len(launches) == 2 * (3 if world_size == 1 else 5)
    assert not [name for name in found["compiled"] if "clone" in name]
