"""Launching the kernels in Triton: how tensors are cut into tiles, and what each is given."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from syncbn._native.plain import is_unobserved
from syncbn.kernels import triton_source
from syncbn.kernels.native import laid_out_as
from syncbn.kernels.protocol import Masking, Normalization
from syncbn.mark import Mark
from syncbn.moments import STAMPED

_PLAIN = (Tensor, torch.nn.Parameter)
# Values of a tile, and threads that hold 8 of them each, which are 16 bytes in half precision.
_TILE, _THREADS = 2048, 256
# Vectors of 16 bytes of a thread of an elementwise kernel, that share what it computes first.
_VECTORS = 4
# Values that a lane adds up before it looks at the rounding error, and loads on their way at once;
# one where loads are narrow, because each then has an address in registers, of which none is left.
_GROUP, _NARROW_GROUP = 4, 1
# Programs of a reduction per multiprocessor, and in all: enough loads on their way, few parts.
_PROGRAMS, _MOST_PROGRAMS = 4, 640
# Programs of a grid along its second axis, which are those along the channels if channels last.
_MOST_BLOCKS = 65535
# Channels of a program that computes with vectors of one value per channel.
_BLOCK = 128
# Values of a tile of several batches by several channels, and batches of one at most.
_MERGED, _MERGED_BATCHES = 1024, 256
# What the source was decorated as when it was imported.
INTERPRETED = type(triton_source.merge).__name__ == "InterpretedFunction"


class Plan(NamedTuple):
    """How a tensor is cut into tiles.

    Attributes:
        extent: rows, c and s: samples, channels and positions if contiguous, the samples being all
            values for an elementwise kernel; positions of all samples, channels and 1 if channels
            last.
        tile: CHANNELS_LAST, ROWS, COLS and ALIGN of the source.
        blocks: programs of a reduction along the channels.
        tiles: tiles of each of them, and how many of those a program takes.
        parts: programs that share these tiles.
        grid: programs of an elementwise kernel.
        warps: warps of a program that has tiles.
    """

    extent: tuple[int, int, int]
    tile: dict[str, Any]
    blocks: int
    tiles: tuple[int, int]
    parts: int
    grid: tuple[int, int]
    warps: int


class Processor(NamedTuple):
    """What the plan depends on of a device: its multiprocessors, and the lanes of a warp."""

    multiprocessors: int
    lanes: int


def moments(x: Tensor, shift: Tensor | None, stamp: bool, mark: Mark | None = None) -> Tensor:
    """Return x's moments, and its stamp if there shall be one."""
    plan, c = _plan(x), x.shape[1]
    parts = _vector(x, plan.parts * (2 * c + 1))
    with _on(x):
        _launchable(triton_source.local_moments, x)[(plan.blocks, plan.parts)](
            x,
            parts,
            *plan.extent,
            *plan.tiles,
            GROUP=_group(plan, x),
            **plan.tile,
            num_warps=plan.warps,
        )
    if plan.parts == 1 and not stamp:
        return parts
    return merge(parts.view(plan.parts, 2 * c + 1), shift, stamp=stamp, mark=mark)


def merge(
    batches: Tensor,
    shift: Tensor | None,
    *,
    stamp: bool = False,
    check: bool = False,
    move: bool = False,
    mark: Mark | None = None,
) -> Tensor:
    """Return the moments of the union of batches, each a row; see the source's `merge`."""
    number, stride = batches.shape
    c = (stride - 1) // 2
    packed = _vector(batches, 2 * c + 1 + stamp)
    tile = _merged_tile(number)
    with _on(batches):
        _launchable(triton_source.merge, batches)[(triton.cdiv(c, tile["CHANNELS"]),)](
            batches, number, stride, c, batches if shift is None else shift, packed,
            *_marked(mark, batches),
            STAMP=stamp, STAMPED=0 if shift is None else STAMPED, MARK=mark is not None,
            CHECK=check, MOVE=move, **tile,
        )  # fmt: skip
    return packed


def normalization(
    packed: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, eps: float
) -> Normalization:
    """Return what normalizes a batch of these moments."""
    statistics, c = torch.empty_like(packed), packed.shape[0] // 2
    coefficients = torch.empty(3 * c, dtype=torch.float32, device=packed.device)
    norm = Normalization(statistics, weight, bias, relu, coefficients)
    with _on(packed):
        _launchable(triton_source.statistics, packed)[(triton.cdiv(c, _BLOCK),)](
            packed, *_vectors(norm)[1:], c, statistics, coefficients, *_parts(eps),
            BLOCK=_BLOCK, **_which(norm),
        )  # fmt: skip
    return norm


def update_running(packed: Tensor, buffers: tuple[Tensor, ...], momentum: float | None) -> None:
    """Move running mean, variance and number of batches towards these moments."""
    with _on(packed):
        _launchable(triton_source.update_running, packed)[(1,)](
            packed, packed.shape[0] // 2, *buffers, *_parts(momentum or 0.0),
            AVERAGE=momentum is None, BLOCK=1024, num_warps=8,
        )  # fmt: skip


def normalize(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """Return y."""
    plan, y = _plan(x, elementwise=True), _like(x)
    residual = None if residual is None else laid_out_as(x, residual)
    with _on(x):
        vectors = _coefficients(x, norm) if norm.coefficients is None else norm.coefficients
        _launchable(triton_source.normalize, x)[plan.grid](
            x, x if residual is None else residual, vectors, y, *plan.extent,
            RESIDUAL=residual is not None, RELU=norm.relu, **plan.tile, num_warps=plan.warps,
        )  # fmt: skip
    return y.to(x.dtype)


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    norm: Normalization,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    mark: Mark | None = None,
    masking: Masking | None = None,
) -> Tensor:
    """Return Σdy and Σdy·x̂; write them, rounded, for the parameters too, and dy, masked."""
    plan, c = _plan(x), x.shape[1]
    parts, sums = _vector(x, plan.parts * 2 * c), _vector(x, 2 * c)
    vectors, tile = _vectors(norm), _merged_tile(plan.parts)
    output, masked = (x, x) if masking is None else masking
    with _on(x):
        _launchable(triton_source.backward_reduce, x)[(plan.blocks, plan.parts)](
            laid_out_as(x, dy), x, laid_out_as(x, output), masked, *vectors, parts,
            *plan.extent, *plan.tiles,
            RELU=norm.relu, MASK=masking is not None, GROUP=_group(plan, x), **_which(norm),
            **plan.tile, num_warps=plan.warps,
        )  # fmt: skip
        _launchable(triton_source.backward_sums, x)[(triton.cdiv(c, tile["CHANNELS"]),)](
            parts, plan.parts, vectors[0], c, sums,
            sums if dweight is None else dweight, sums if dbias is None else dbias,
            *_marked(mark, sums),
            DWEIGHT=dweight is not None, DBIAS=dbias is not None, MARK=mark is not None,
            **tile,
        )  # fmt: skip
    return sums


def backward_input(
    dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor, mark: Mark | None = None
) -> Tensor:
    """Return dx."""
    plan, dx = _plan(x, elementwise=True), _like(x)
    with _on(x):
        vectors = _coefficients(x, norm, sums.double().contiguous())
        _launchable(triton_source.backward_input, x)[plan.grid](
            laid_out_as(x, dy), x, vectors, dx, *plan.extent, *_marked(mark, sums),
            RELU=norm.relu, MARK=mark is not None, **plan.tile, num_warps=plan.warps,
        )  # fmt: skip
    return dx.to(x.dtype)


def _coefficients(x: Tensor, norm: Normalization, sums: Tensor | None = None) -> Tensor:
    """Return what the elementwise kernels need of each channel; with sums, for the gradient."""
    c, vectors = x.shape[1], _vectors(norm)
    result = torch.empty((3 if sums is None else 5) * c, dtype=torch.float32, device=x.device)
    _launchable(triton_source.coefficients, x)[(triton.cdiv(c, _BLOCK),)](
        *vectors, vectors[0] if sums is None else sums, c, result,
        BACKWARD=sums is not None, BLOCK=_BLOCK, **_which(norm),
    )  # fmt: skip
    return result


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched where a tensor lies."""
    if type(x) not in _PLAIN:
        return nullcontext()  # it stands for others in a graph, which sees to it by itself
    # The interpreter computes by numpy, which warns of NaN and infinities; a GPU does not.
    return torch.cuda.device(x.device) if x.is_cuda else numpy.errstate(all="ignore")


def _launchable(kernel: Any, x: Tensor) -> Any:
    """Return a kernel as it is, or, if x stands for others, as the graph that is made takes it."""
    return kernel if type(x) in _PLAIN else wrap_triton(kernel)


def _plan(x: Tensor, elementwise: bool = False) -> Plan:
    vector = max(1, 16 // x.element_size()) if elementwise else 0
    plan_of = _known_plan if is_unobserved() else _plan_of  # which may be given symbols
    return plan_of(x.shape, x.is_contiguous(), vector, _processor(x.device), _TILE)


def _plan_of(
    shape: torch.Size, contiguous: bool, vector: int, processor: Processor, tile: int
) -> Plan:
    """Return the plan of an elementwise kernel, whose vectors have so many values, or of a sum."""
    n, c, s = shape[0], int(shape[1]), int(shape[2:].numel())
    size = n * c * s
    # Without spatial axes, or with one position, the two layouts are the same memory.
    channels_last = s == 1 or not contiguous
    if vector and not channels_last:
        # A vector may go from one image to the next, and no further.
        vector = math.gcd(c * s, min(vector, 1 << s.bit_length() - 1))
    if vector:
        tile = tile // 8 * _VECTORS * vector
    if vector and not channels_last:
        rows, width, cols, height = size, s, vector, tile // vector
        blocks, tiles = 1, triton.cdiv(size, tile)
        grid = tiles, 1
    else:
        rows, width = (n * s, c) if channels_last else (n, s)
        widest = max(64, triton.next_power_of_2(triton.cdiv(c, _MOST_BLOCKS)))
        cols = min(triton.next_power_of_2(width), widest if channels_last else 512, tile)
        height = tile // cols
        blocks = triton.cdiv(c, cols) if channels_last else c
        tiles = triton.cdiv(rows, height) * (1 if channels_last else triton.cdiv(s, cols))
        grid = triton.cdiv(rows, height), triton.cdiv(width, cols)
    programs = triton.cdiv(min(_PROGRAMS * processor.multiprocessors, _MOST_PROGRAMS), blocks)
    each = triton.cdiv(tiles, min(tiles, programs))
    return Plan(
        (rows, c, 1 if channels_last else s),
        {
            "CHANNELS_LAST": channels_last,
            "ROWS": height,
            "COLS": cols,
            "ALIGN": math.gcd(width, 16),
        },
        blocks,
        (tiles, each),
        triton.cdiv(tiles, each),
        grid,
        _THREADS // processor.lanes,
    )


_known_plan = lru_cache(maxsize=4096)(_plan_of)


def _group(plan: Plan, x: Tensor) -> int:
    return _GROUP if plan.tile["ALIGN"] * x.element_size() >= 16 else _NARROW_GROUP


def _merged_tile(number: int) -> dict[str, int]:
    """Return how many of so many batches, and how many channels, a program takes at once."""
    batches = triton.next_power_of_2(min(int(number), _MERGED_BATCHES))
    return {"BATCHES": batches, "CHANNELS": min(max(_MERGED // batches, 8), _BLOCK)}


@lru_cache
def _processor(device: torch.device) -> Processor:
    if device.type != "cuda":
        return Processor(2, 32)  # interpreted: enough for several parts
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.multi_processor_count, properties.warp_size)


def _vector(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=x.device)


def _like(x: Tensor) -> Tensor:
    """Return a tensor for values like x's, in float32 where the interpreter would cut bits off."""
    cut = INTERPRETED and x.dtype is torch.bfloat16
    return torch.empty_like(x, dtype=torch.float32 if cut else x.dtype)


def _parts(value: float) -> tuple[float, float, float]:
    """Return three numbers of float32, whose (first + second)·third² is a float64 to 2⁻⁴⁸."""
    scale = 1.0 if value == 0 or abs(value) > 1e-20 else 2.0**-100
    value /= scale * scale
    head = float(numpy.float32(value))
    return head, float(numpy.float32(value - head)), scale


def _marked(mark: Mark | None, instead: Tensor) -> tuple[Tensor, int]:
    """Return where to write which number; anything, if there is no mark."""
    return (instead, 0) if mark is None else mark


def _vectors(norm: Normalization) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics, weight and bias; the statistics in place of one that is absent."""
    statistics = norm.statistics.contiguous()
    weight, bias = (statistics if p is None else p.contiguous() for p in (norm.weight, norm.bias))
    return statistics, weight, bias


def _which(norm: Normalization) -> dict[str, bool]:
    return {"WEIGHT": norm.weight is not None, "BIAS": norm.bias is not None}
