"""What a training step of the layer costs a GPU, counted without one, beside torch's layer.

Bytes: every load and store of the kernels in Triton, interpreted on the CPU, over the least that a
step must read and write: forward x twice and y; backward x and dy twice and dx; with a residual,
that too; and with a ReLU after a residual, y, and the residual's gradient. A tensor is small here,
because the interpreter is slow, and so is the processor that it is cut into tiles for: a program
then has as many tiles as with a tensor of some 100 MB on an H200.

Launches, waits, memory: of a step on tensors without memory, as large as ResNet-50's, on an H200's
132 multiprocessors, through autograd, and with the exchanges of two ranks. An operation of torch
counts as one launch, as some are several.

torch's: its SyncBatchNorm's own forward and backward in the same way, an operation of torch reading
its inputs and writing its outputs once; a ReLU and a residual are operations of their own. It waits
where it takes rows by a mask.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import _functions
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncbn
from scripts.bench.gpu.cases import IMAGES, MEMORY_FORMATS, VARIANTS, Case
from scripts.bench.gpu.count import H200, Count, Launch, counting
from scripts.bench.measure import Rows
from syncbn.kernels.triton_launch import Processor

# A processor that is to the first shape what an H200 is to some 100 MB.
_SMALL = Processor(1, 32)
BYTES = [
    Case((12, 64, 28, 28), "float16", "channels_last", "plain"),
    Case((16, 8, 28, 28), "float16", "contiguous", "relu"),
    Case((6, 10, 14, 14), "float32", "channels_last", "relu"),
    Case((6, 10, 14, 14), "float32", "contiguous", "residual + relu"),
    Case((5, 12, 7, 7), "float32", "contiguous", "plain"),
    Case((5, 13, 7, 5), "float16", "channels_last", "residual + relu"),
]
# The bars.
MOST_BYTES, MOST_LAUNCHES, MOST_MEMORY_BYTES = 1.02, 12, 1e6
# Whose vectors are small beside it.
MAIN = BYTES[:2]


class _Pass(NamedTuple):
    """Passes over a tensor that forward and backward cannot do without."""

    forward: int
    backward: int


_LEAST = {"plain": _Pass(3, 5), "relu": _Pass(3, 5), "residual + relu": _Pass(4, 7)}


class TorchsSyncBatchNorm(nn.BatchNorm2d):
    """What torch.nn.SyncBatchNorm does in training, on any device: that refuses all but GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, normalized over the default group."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        buffers = self.running_mean, self.running_var
        group, world_size = dist.group.WORLD, dist.get_world_size()
        y: Any = _functions.SyncBatchNorm.apply(
            *(input, self.weight, self.bias, *buffers, self.eps, self.momentum, group, world_size)
        )
        return y


class _Separate(nn.Module):
    """A layer, and a residual and a ReLU by operations of their own."""

    def __init__(self, layer: nn.Module, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.layer(input)
        if residual is not None:
            y = y.add_(residual)
        return functional.relu(y, inplace=True) if self.relu else y


@contextmanager
def _world(size: int) -> Generator[None]:
    """Be the first of so many ranks, whose exchanges go nowhere."""
    if size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_step(
    case: Case, *, ours: bool, processor: Processor = H200, interpret: bool = False
) -> tuple[Count, tuple[int, int]]:
    """Count a training step in the present world.

    Args:
        case: the input.
        ours: whether the layer is ours, or torch's.
        processor: to cut tensors into tiles for.
        interpret: whether to interpret our kernels, on the CPU.

    Returns:
        The count, and the bytes of y, and of the gradients.
    """
    device = "cpu" if interpret else "meta"
    relu, c = "relu" in case.variant, case.shape[1]
    layer: nn.Module
    if ours:
        layer = syncbn.SyncBatchNorm(c, device=device, relu=relu)
    else:
        layer = _Separate(TorchsSyncBatchNorm(c, device=device), relu)
    tensors = [
        torch.zeros(case.shape, dtype=getattr(torch, case.dtype), device=device).contiguous(
            memory_format=MEMORY_FORMATS[case.layout]
        )
        for _ in range(3 if "residual" in case.variant else 2)
    ]
    x, dy, *residual = tensors
    inputs = [x.requires_grad_(), *layer.parameters(), *(r.requires_grad_() for r in residual)]
    with counting(x.numel(), processor, interpret) as count:
        y = layer(x, *residual)
        count.backward = True
        gradients = torch.autograd.grad(y, inputs, dy)
    return count, (y.nbytes, sum(gradient.nbytes for gradient in gradients))


def count_bytes() -> Rows:
    """Return bytes over the least possible, by interpretation."""
    rows: Rows = []
    for case in BYTES:
        ours, _ = count_step(case, ours=True, processor=_SMALL, interpret=True)
        with _world(2):
            theirs, _ = count_step(case, ours=False)
        row = case.row()
        least, size = _LEAST[case.variant], case.size_bytes
        passes = [_tensor_bytes(ours, i == 1) / size for i in range(2)]
        row |= {"tensors": f"{passes[0]:.2f} + {passes[1]:.2f}"}
        row |= {"least": f"{least.forward} + {least.backward}"}
        row["tensors / least"] = sum(passes) / sum(least)
        total = sum(launch.tensor_bytes + launch.vector_bytes for launch in ours.launches)
        row["all / least"] = total / size / sum(least)
        sectors = sum(launch.sector_bytes for launch in ours.launches)
        row["sectors / least"] = sectors / size / sum(least)
        theirs_of = [_tensor_bytes(theirs, i == 1) / size for i in range(2)]
        row["torch's"] = f"{theirs_of[0]:.0f} + {theirs_of[1]:.0f}"
        row["torch's / least"] = sum(theirs_of) / sum(least)
        rows.append(row)
    return rows


def count_launches() -> Rows:
    """Return launches and waits of a step, in worlds of one and two."""
    rows: Rows = []
    for world_size in (1, 2):
        for variant in VARIANTS:
            case = Case((64, 256, 56, 56), "bfloat16", "channels_last", variant)
            with _world(world_size):
                ours, _ = count_step(case, ours=True)
                row: dict[str, Any] = {"W": world_size, "variant": variant}
                row |= _launches("ours", ours)
                if world_size > 1:
                    row |= _launches("torch's", count_step(case, ours=False)[0])
                else:  # which is nn.BatchNorm2d then
                    row |= dict.fromkeys(("torch's", "torch's total", "torch's waits"), "")
            row["names"] = _names(ours.launches)
            rows.append(row)
    return rows


def count_memory() -> Rows:
    """Return the most memory at a time beyond y and gradients, for the inputs of ResNet-50.

    No less than it is: all that a pass asks for, as if it freed nothing, and what is saved.
    """
    rows: Rows = []
    with _world(2):
        for c, side in IMAGES:
            row: dict[str, Any] = {"shape": f"64×{c}×{side}×{side}"}
            for layout in MEMORY_FORMATS:
                case = Case((64, c, side, side), "bfloat16", layout, "relu")
                for name, ours in (("ours", True), ("torch's", False)):
                    count, result_bytes = count_step(case, ours=ours)
                    forward, backward = (
                        asked - kept
                        for asked, kept in zip(count.allocated_bytes, result_bytes, strict=True)
                    )
                    saved = 8 * (2 * c + 1)  # statistics, in float64 at most
                    row[f"{name}, {layout} KB"] = max(forward, backward + saved) / 1e3
            rows.append(row)
    return rows


SECTIONS = {"bytes": count_bytes, "launches": count_launches, "memory": count_memory}


def verdict(name: str, rows: Rows) -> str:
    """Return a sentence about a section's bar."""
    if name == "bytes":
        main = [row for row in rows if any(case.row().items() <= row.items() for case in MAIN)]
        worst, bar, unit = max(row["all / least"] for row in main), MOST_BYTES, "all bytes / least"
        return _sentence(f"{unit} where vectors are small beside the tensor", worst, bar)
    if name == "launches":
        most = max(row["ours total"] for row in rows)
        return _sentence("launches of a step, forward and backward", most, MOST_LAUNCHES)
    worst = max(value for row in rows for key, value in row.items() if key.startswith("ours"))
    return _sentence("KB beyond outputs and gradients", worst, MOST_MEMORY_BYTES / 1e3)


def _sentence(what: str, measured: float, bar: float) -> str:
    number = f"{measured:.3f}".rstrip("0").rstrip(".")
    kept = "kept" if measured <= bar else "MISSED"
    return f"The most {what}: {number}, of {bar:g} allowed: {kept}."


def _tensor_bytes(count: Count, backward: bool) -> int:
    return sum(each.tensor_bytes for each in count.launches if each.backward == backward)


def _launches(name: str, count: Count) -> dict[str, Any]:
    backward = sum(launch.backward for launch in count.launches)
    forward = len(count.launches) - backward
    return {
        name: f"{forward} + {backward}",
        f"{name} total": forward + backward,
        f"{name} waits": len(count.waits),
    }


def _names(launches: list[Launch]) -> str:
    return ", ".join(launch.name for launch in launches)
