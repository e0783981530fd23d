"""Compile the Triton kernels for GPUs that are not here; say what each needs, fail if one is bad.

python -m scripts.dev.compile_kernels                                     everything
python -m scripts.dev.compile_kernels --target sm_90 --kernel normalize   some of it
python -m scripts.dev.compile_kernels --json FILE                         the table as JSON, too

Calls the product's own methods on tensors without memory, and compiles what they launch instead of
launching it, so that signatures, constants, tiles and warps are those of the product. A row is bad
if its kernel does not compile, if it spills registers, or if it reads or writes a large tensor in
less than 16 bytes though the tensor's layout allows them.

A column of the table shows the bytes of the narrowest access to each of the large tensors.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from scripts.dev.compiled import Usage, accesses, usage
from syncbn.comm import symmetric_memory
from syncbn.kernels import triton as product
from syncbn.kernels import triton_launch as launch
from syncbn.kernels.protocol import Masking, Normalization
from syncbn.mark import Mark, Marks


class Target(NamedTuple):
    """A GPU: for whom to compile, and how many multiprocessors such a one has."""

    gpu: GPUTarget
    processors: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# ResNet-50's, of a batch of 64: images whose size 16 divides, and its smallest ones.
SHAPES = {"contiguous": [(64, 256, 56, 56), (64, 2048, 7, 7)], "channels_last": [(64, 256, 56, 56)]}
WIDE_BYTES = 16


@dataclass(frozen=True)
class Row:
    """A kernel as it is launched for one kind of tensors, and what became of it.

    Attributes:
        kernel: its name, and the flags among its constants that are set.
        dtype, layout, shape: those of the large tensors; empty if it has none.
        target: one of TARGETS.
        tile: rows by columns, empty if it has none.
        bytes: by large tensor and kind of access, the bytes of the narrowest one.
        fault: what is bad about it; empty if nothing is.
    """

    kernel: str
    dtype: str
    layout: str
    shape: str
    target: str
    tile: str = ""
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    bytes: dict[str, int] = field(default_factory=dict[str, int])
    fault: str = ""

    def __str__(self) -> str:
        """Return what identifies the row."""
        parts = (self.kernel, self.dtype, self.layout, self.shape, self.target)
        return ", ".join(part for part in parts if part)


class Launch(NamedTuple):
    """What the product launched, and the kernel compiled for it, or why there is none."""

    function: Any
    arguments: dict[str, Any]
    kernel: Any
    error: str


class Driver:
    """What Triton asks its driver for before it compiles, answered without a GPU."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        """Return the target's name, by which Triton keeps what is compiled."""
        return self.name

    def get_current_stream(self, device: str) -> int:
        """Return the stream that nothing is launched on."""
        return 0


@contextmanager
def launches_on(name: str, only: str | None = None) -> Generator[list[Launch]]:
    """Compile for a target what the product launches within, one kernel or all, and list it.

    Triton itself compiles without launching when asked to warm up, and does all else as ever: only
    the launch is replaced, and what the product asks of a device.
    """
    launches: list[Launch] = []
    run = triton.JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        if only not in (None, function.__name__):
            return
        arguments = dict(zip(function.arg_names, args, strict=False)) | options
        kernel, error = None, ""
        try:
            kernel = run(function, *args, grid=grid, warmup=True, **options)
        except Exception as failure:  # each stage of the compiler raises its own
            error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
        launches.append(Launch(function, arguments, kernel, error))

    target = TARGETS[name]
    processor = launch.Processor(target.processors, target.gpu.warp_size)
    drivers: Any = triton.runtime.driver
    drivers.set_active(Driver(name))
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", compile_only),
            mock.patch.object(product, "are_here", return_value=True),
            mock.patch.object(launch, "_processor", return_value=processor),
        ):
            yield launches
    finally:
        drivers.set_active(None)  # the default is made when it is asked for, and may not exist


def run_layer(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Call all kernels as a layer does, with and without what is optional, and those of comm."""
    kernels, c = product.TritonKernels(), shape[1]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    dy, residual = torch.empty_like(x), torch.empty_like(x)
    weight, bias, shift = _vector(c), _vector(c), _vector(c, torch.float64)
    slot = _vector(1, torch.int64)
    marks = Marks(Mark(slot, 2), Mark(slot, 3))
    moments = kernels.local_moments(x)
    for memory in (None, shift):
        row = kernels.row(x, memory, marks.before)
        kernels.merge(row.expand(8, -1).contiguous(), memory, marks.after)
    for parameters in ((None, None, False), (weight, bias, False), (weight, bias, True)):
        norm = kernels.normalization(moments, *parameters, 1e-5)
        kernels.normalize(x, norm)
        kernels.backward_input(dy, x, norm, kernels.backward_reduce(dy, x, norm))
    kernels.normalize(x, norm, residual)
    kernels.normalize(x, Normalization(norm.statistics, weight, bias))
    kernels.gradients(dy, x, norm, _vector(c), _vector(c), lambda sums: sums, marks)
    masking = Masking(residual, torch.empty_like(x))
    kernels.gradients(dy, x, Normalization(*norm[:3]), None, None, None, masking=masking)
    tracked = _vector(1, torch.int64)[0]
    for momentum in (0.1, None):
        kernels.update_running(moments, _vector(c), _vector(c), tracked, momentum)
    memory, addresses, calls = (_vector(size, torch.int64) for size in (1, 8, 8))
    mailboxes = symmetric_memory.Mailboxes(memory, addresses, calls, 0, 2**13, 10**9)
    symmetric_memory.add_up(mailboxes.gather(_vector(2 * c + 2, torch.float64)))


def _vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def rows_of(target: str, dtype: torch.dtype, only: str | None = None) -> list[Row]:
    """Compile for a target what is launched for tensors of a dtype; one kernel, or all."""
    rows: dict[str, Row] = {}
    for layout, shapes in SHAPES.items():
        for shape in shapes:
            with launches_on(target, only) as launches:
                run_layer(shape, dtype, layout)
            for launched in launches:
                row = _row(launched, shape, dtype, layout, target)
                rows.setdefault(str(row), row)
    return list(rows.values())


def _row(
    launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: str
) -> Row:
    arguments = launch.arguments
    size = torch.Size(shape).numel()
    large = {
        name: tensor
        for name, tensor in arguments.items()
        if isinstance(tensor, Tensor) and tensor.numel() == size
    }
    flags = [name for name, value in arguments.items() if value is True and name != "CHANNELS_LAST"]
    kernel = " + ".join([launch.function.__name__, *(flag.lower() for flag in flags)])
    positions = "×".join(map(str, shape[2:]))
    kind = (str(dtype).removeprefix("torch."), layout, positions) if large else ("", "", "")
    tile = f"{arguments['ROWS']}×{arguments['COLS']}" if "ROWS" in arguments else ""
    if launch.kernel is None:
        return Row(kernel, *kind, target, tile, fault=f"does not compile: {launch.error}")
    needs = usage(launch.kernel)
    narrowest = _narrowest(launch, large)
    # What a kernel finds side by side: all values if it computes each by itself, without sums.
    together = shape[1] if layout == "channels_last" else torch.Size(shape[2:]).numel()
    if layout == "contiguous" and "GROUP" not in arguments:
        together = size
    fault = _fault(large, needs, narrowest, math.gcd(WIDE_BYTES, together * dtype.itemsize))
    return Row(kernel, *kind, target, tile, *needs, narrowest, fault)


def _narrowest(launch: Launch, large: dict[str, Tensor]) -> dict[str, int]:
    """Return the bytes of the narrowest access, by tensor and kind, as in {"x load": 16}."""
    found: dict[str, int] = {}
    for access in accesses(launch.kernel):
        name = launch.function.arg_names[access.argument]
        if name in large:
            key = f"{name} {access.kind}"
            found[key] = min(found.get(key, access.size_bytes), access.size_bytes)
    return found


def _fault(
    large: dict[str, Tensor], needs: Usage, narrowest: dict[str, int], required_bytes: int
) -> str:
    """Return what is bad about a compiled kernel, or nothing."""
    faults = [f"spills {needs.spills}"] if needs.spills else []
    faults += [
        f"{key}s have {size} bytes, {required_bytes} are possible"
        for key, size in narrowest.items()
        if size < required_bytes
    ]
    # An absent residual is passed as x, and not accessed by its own name.
    accessed = {id(large[key.split()[0]]) for key in narrowest}
    faults += [
        f"no access to {name} was found"
        for name, tensor in large.items()
        if id(tensor) not in accessed
    ]
    return "; ".join(faults)


def _table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table in markdown."""
    yield "| kernel | dtype | layout | target | tile | registers | spills | shared | bytes | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        widths = ", ".join(f"{key} {size}" for key, size in row.bytes.items())
        cells = (row.kernel, row.dtype, f"{row.layout} {row.shape}".strip(), row.target, row.tile)
        numbers = (row.registers, row.spills, row.shared_bytes)
        yield f"| {' | '.join(map(str, (*cells, *numbers, widths, row.fault and 'BAD')))} |"


def main() -> None:
    """Compile what was asked for, and print the table; exit with 1 if a row is bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=list(TARGETS), help="one GPU instead of all")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in DTYPES], help="one dtype")
    parser.add_argument("--kernel", help="one kernel instead of all, by its name in the source")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, too")
    arguments = parser.parse_args()
    if launch.INTERPRETED:
        sys.exit("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    targets = [arguments.target] if arguments.target else list(TARGETS)
    dtypes = [getattr(torch, arguments.dtype)] if arguments.dtype else DTYPES
    jobs = [(target, dtype, arguments.kernel) for target in targets for dtype in dtypes]
    # Forked, so that the processes need not import torch again.
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        found = [row for rows in pool.map(rows_of, *zip(*jobs, strict=True)) for row in rows]
    # What has no large tensors is the same for each dtype.
    rows = list({str(row): row for row in found}.values())
    if not rows:
        sys.exit(f"the layer launches no kernel named {arguments.kernel!r}")
    print("\n".join(_table(rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.fault]
    for row in bad:
        print(f"{row}: {row.fault}", file=sys.stderr)
    if bad:
        sys.exit(f"{len(bad)} of {len(rows)} are bad")


if __name__ == "__main__":
    main()
