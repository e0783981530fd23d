"""The kernels in Triton, for tensors on a GPU; `triton_source.py` has the loops."""

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor

from syncbn._native.plain import are_plain, has_memory
from syncbn.kernels import triton_source
from syncbn.kernels.native import is_channels_last, laid_out_as
from syncbn.kernels.protocol import Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
# Values of a tile; 8 warps hold 8 of them a thread, which are 16 bytes in half precision.
_TILE, _WARPS = 2048, 8
# Channels of a program that computes with vectors of one value per channel.
_BLOCK = 128
# Programs of a reduction per multiprocessor, so that enough loads are on their way.
_PROGRAMS = 4
# What the source was decorated as when it was imported.
INTERPRETED = not isinstance(triton_source.merge, triton.JITFunction)


class Plan(NamedTuple):
    """How a tensor is cut into tiles.

    Attributes:
        extent: rows, c and s: samples, channels and positions if contiguous; positions of all
            samples, channels and 1 if channels last.
        tile: CHANNELS_LAST, ROWS and COLS of the source.
        blocks: programs of a reduction along the channels.
        tiles: tiles of each of them, and how many of those a program takes.
        parts: programs that share these tiles.
        grid: programs of an elementwise kernel.
    """

    extent: tuple[int, int, int]
    tile: dict[str, Any]
    blocks: int
    tiles: tuple[int, int]
    parts: int
    grid: tuple[int, int]


class TritonKernels:
    """Batch normalization's kernels, one pass over memory each; see `Kernels` in `protocol.py`.

    float32, bfloat16 and float16 on a GPU, contiguous or channels last. Anything else is left to
    the reference. Sums over a batch are made in float32 lanes that carry their rounding errors
    along, and finished in float64; results are the same from run to run. With TRITON_INTERPRET=1 in
    the environment, Triton interprets the kernels, slowly, on the CPU.

    Error: σ² to about 1e-8 of itself, however far the mean lies from 0, as long as (x − mean)² fits
    float32; a tensor with larger deviations has an infinite variance.
    """

    def local_moments(self, x: Tensor) -> Moments:
        """Return count, mean and M2 of each channel of x, shape (N, C, *)."""
        if not can_take(x) or x.numel() == 0:
            return _REFERENCE.local_moments(x)
        plan, c = _plan(x), x.shape[1]
        parts = _vector(x, plan.parts * (2 * c + 1))
        with _on(x):
            triton_source.local_moments[plan.blocks, plan.parts](
                x, parts, *plan.extent, *plan.tiles, **plan.tile, num_warps=_WARPS
            )
            return Moments(merge(parts, plan.parts))

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        """Return (x − mean)·invstd·weight + bias + residual, or max(·, 0), in x's dtype, format."""
        if not can_take(x, *norm[:3], residual) or x.numel() == 0:
            return _REFERENCE.normalize(x, norm, residual)
        plan, y = _plan(x, images=True), _like(x)
        residual = None if residual is None else laid_out_as(x, residual)
        with _on(x):
            triton_source.normalize[plan.grid](
                x, x if residual is None else residual, *_vectors(norm), y, *plan.extent,
                RESIDUAL=residual is not None, RELU=norm.relu, **_which(norm), **plan.tile,
                num_warps=_WARPS,
            )  # fmt: skip
        return y.to(x.dtype)

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """Return Σdy and Σdy·x̂ over this replica, shape (2C,), float64."""
        if not can_take(x, dy, *norm[:3]) or x.numel() == 0:
            return _REFERENCE.backward_reduce(dy, x, norm)
        plan, c = _plan(x), x.shape[1]
        parts, sums = _vector(x, plan.parts * 2 * c), _vector(x, 2 * c)
        dy, vectors = laid_out_as(x, dy), _vectors(norm)
        with _on(x):
            triton_source.backward_reduce[plan.blocks, plan.parts](
                dy, x, *vectors, parts, *plan.extent, *plan.tiles,
                RELU=norm.relu, **_which(norm), **plan.tile, num_warps=_WARPS,
            )  # fmt: skip
            triton_source.backward_sums[(triton.cdiv(c, _BLOCK),)](
                parts, plan.parts, vectors[0], c, sums, sums, sums,
                DWEIGHT=False, DBIAS=False, BLOCK=_BLOCK,
            )  # fmt: skip
        return sums

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        """Return dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), in x's dtype and format."""
        if not can_take(x, dy, *norm[:3], sums) or x.numel() == 0:
            return _REFERENCE.backward_input(dy, x, norm, sums)
        plan, dx = _plan(x, images=True), _like(x)
        with _on(x):
            triton_source.backward_input[plan.grid](
                laid_out_as(x, dy), x, *_vectors(norm), sums.double().contiguous(), dx,
                *plan.extent, RELU=norm.relu, **_which(norm), **plan.tile, num_warps=_WARPS,
            )  # fmt: skip
        return dx.to(x.dtype)

    def update_running(
        self,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        momentum: float | None,
    ) -> None:
        """Move running statistics, in place, towards the moments of a batch."""
        buffers = running_mean, running_var, num_batches_tracked
        c = moments.packed.shape[0] // 2
        if not (
            _are_here(moments.packed, *buffers)
            and running_mean.numel() == running_var.numel() == c
            and all(buffer.is_contiguous() for buffer in buffers)
            and not (INTERPRETED and running_mean.dtype is torch.bfloat16)  # see _like
        ):
            _REFERENCE.update_running(moments, *buffers, momentum)
            return
        with _on(running_mean):
            triton_source.update_running[(1,)](
                moments.packed, c, *buffers,
                MOMENTUM=momentum or 0.0, AVERAGE=momentum is None, BLOCK=1024,
            )  # fmt: skip
        torch.autograd.graph.increment_version(buffers)


_REFERENCE = ReferenceKernels()


def merge(parts: Tensor, number: int) -> Tensor:
    """Return the moments of the union of so many batches, given one after the other."""
    if number == 1:
        return parts
    c = parts.numel() // number // 2
    packed = _vector(parts, 2 * c + 1)
    triton_source.merge[(triton.cdiv(c, _BLOCK),)](parts, number, c, packed, BLOCK=_BLOCK)
    return packed


def can_take(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels can compute with these tensors."""
    return (
        _are_here(x, *others)
        and x.dtype in DTYPES
        and (x.is_contiguous() or is_channels_last(x))
    )


def _are_here(*tensors: Tensor | None) -> bool:
    """Return whether these are tensors in the memory that the kernels run on."""
    if INTERPRETED:
        return are_plain(*tensors)
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cuda and has_memory(tensor)
        ):
            return False
    return True


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched where a tensor lies."""
    # The interpreter computes by numpy, which warns of NaN and infinities; a GPU does not.
    return torch.cuda.device(x.device) if x.is_cuda else numpy.errstate(all="ignore")


def _plan(x: Tensor, images: bool = False) -> Plan:
    return _plan_of(x.shape, x.is_contiguous(), images, _processors(x.device), _TILE)


@lru_cache(maxsize=4096)
def _plan_of(
    shape: torch.Size, contiguous: bool, images: bool, processors: int, tile: int
) -> Plan:
    n, c = shape[0], shape[1]
    s = shape.numel() // (n * c)
    # Without spatial axes, or with one position, the two layouts are the same memory.
    channels_last = s == 1 or not contiguous
    rows, width = (n * s, c) if channels_last else (n * c if images else n, s)
    cols = min(triton.next_power_of_2(width), 64 if channels_last else 512, tile)
    height = tile // cols
    blocks = triton.cdiv(c, cols) if channels_last else c
    tiles = triton.cdiv(rows, height) * (1 if channels_last else triton.cdiv(s, cols))
    each = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS * processors, blocks)))
    return Plan(
        (rows, c, 1 if channels_last else s),
        {"CHANNELS_LAST": channels_last, "ROWS": height, "COLS": cols},
        blocks,
        (tiles, each),
        triton.cdiv(tiles, each),
        (triton.cdiv(rows, height), triton.cdiv(width, cols)),
    )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted: enough for several parts
    return torch.cuda.get_device_properties(device).multi_processor_count


def _vector(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=x.device)


def _like(x: Tensor) -> Tensor:
    """Return a tensor for values like x's; the interpreter cuts bfloat16 off instead of rounding."""
    cut = INTERPRETED and x.dtype is torch.bfloat16
    return torch.empty_like(x, dtype=torch.float32 if cut else x.dtype)


def _vectors(norm: Normalization) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics, weight and bias; the statistics in place of one that is absent."""
    statistics = norm.statistics.contiguous()
    weight, bias = (statistics if p is None else p.contiguous() for p in (norm.weight, norm.bias))
    return statistics, weight, bias


def _which(norm: Normalization) -> dict[str, bool]:
    return {"WEIGHT": norm.weight is not None, "BIAS": norm.bias is not None}
