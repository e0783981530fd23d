"""The kernels in Triton, interpreted: on two ranks, far from 0, and on images of odd sizes."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn

import syncbn
from syncbn.kernels.protocol import Normalization
from syncbn.kernels.reference import ReferenceKernels
from tests.support.interpreted import interpreting, launch, tiles_of
from tests.support.world import run_world

ROWS = {"even": (3, 3), "uneven": (1, 5), "empty": (0, 4)}


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


def _two_ranks(rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, sum(rows), 5, 4, 3).unbind()
    truth = nn.BatchNorm2d(5).double()
    expected = _step(truth, x.double(), dy.double())
    layer = syncbn.SyncBatchNorm(5)
    start = sum(rows[: dist.get_rank()])
    mine = slice(start, start + rows[dist.get_rank()])
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        results = _step(layer, x[mine], dy[mine])
    for result, whole in zip(results, expected, strict=True):
        # A few roundings in float32 of values below 8.
        torch.testing.assert_close(result.double(), whole[mine], rtol=0, atol=8 * 4 * 2.0**-24)
    for parameter, other in zip(layer.parameters(), truth.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
    assert layer.running_var is not None
    assert truth.running_var is not None
    running_var = layer.running_var.double()
    torch.testing.assert_close(running_var, truth.running_var, rtol=2e-7, atol=0)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_two_ranks_compute_what_one_process_computes(rows: tuple[int, int]) -> None:
    run_world(2, _two_ranks, rows)


@pytest.mark.parametrize(("mean", "dtype"), [(1e6, torch.float32), (100.0, torch.bfloat16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_variance_far_from_0_keeps_its_digits(
    mean: float, dtype: torch.dtype, channels_last: bool
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(16, 3, 20, 20, dtype=torch.float64) + mean).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with tiles_of(512) as kernels:
        moments = kernels.local_moments(x)
        again = kernels.local_moments(x)
    exact = x.double()
    expected = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(moments.variance(), expected, rtol=1e-6, atol=0)
    assert torch.equal(again.packed, moments.packed)


@pytest.mark.parametrize("samples", [1, 9])
def test_variance_whose_squares_overflow_is_no_number(samples: int) -> None:
    torch.manual_seed(0)
    x = 1e25 * torch.randn(samples, 1, 64)
    with tiles_of(64) as kernels:
        moments = kernels.local_moments(x)
    torch.testing.assert_close(moments.mean, x.double().mean((0, 2)), rtol=1e-6, atol=1e18)
    assert not moments.m2.isfinite()


# Vectors that begin in one channel and end in the next: of 8 values, 4 and 2, over the end of the
# tensor's channels too, and with 1 the least image that has vectors.
@pytest.mark.parametrize("shape", [(4, 4, 7, 7), (2, 6, 14, 7), (4, 8, 5, 1), (3, 8, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
def test_images_that_no_vector_divides_are_normalized(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool
) -> None:
    torch.manual_seed(0)
    c = shape[1]
    x, dy, residual = torch.randn(3, *shape).to(dtype).unbind()
    statistics = torch.cat([torch.tensor([x.numel() / c]), torch.randn(c), torch.rand(c) + 0.5])
    norm = Normalization(statistics.double(), torch.randn(c), torch.randn(c), relu)
    reference = ReferenceKernels()
    sums = reference.backward_reduce(dy, x, norm)
    with tiles_of(16) as kernels:  # several of them
        y = kernels.normalize(x, norm, residual)
        dx = kernels.backward_input(dy, x, norm, sums)
    # A few roundings of values below 32.
    atol = 32 * torch.finfo(dtype).eps
    expected = reference.normalize(x, norm, residual)
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    expected = reference.backward_input(dy, x, norm, sums)
    torch.testing.assert_close(dx, expected, rtol=0, atol=atol)


def test_every_kernel_is_launched_on_the_device_of_its_tensors() -> None:
    devices: list[torch.device] = []
    launched: list[str] = []

    @contextmanager
    def on(x: Tensor) -> Generator[None]:
        devices.append(x.device)
        yield
        devices.pop()

    def launchable(kernel: Any, x: Tensor) -> Any:
        launched.append(kernel.__name__)
        assert devices == [x.device], kernel.__name__
        return kernel

    x, vector, shift = torch.randn(4, 3, 20), torch.ones(3), torch.zeros(3).double()
    with (
        mock.patch.object(launch, "_on", on),
        mock.patch.object(launch, "_launchable", launchable),
        tiles_of(16) as kernels,
    ):
        moments = kernels.merge(kernels.row(x, shift).expand(2, -1).contiguous(), shift)
        kernels.local_moments(x)
        norm = kernels.normalization(moments, vector, vector, True, 1e-5)
        kernels.normalize(x, norm)
        kernels.gradients(x, x, norm, None, None, lambda sums: sums)
        kernels.update_running(moments, vector.clone(), vector.clone(), torch.tensor(0), 0.1)
    assert len(set(launched)) == 9


with interpreting():
    reduced_tile: Any = launch.triton_source._reduced_tile  # pyright: ignore[reportPrivateUsage] -- the largest sizes cannot be tried out

    @triton.jit
    def _write_offsets(tile: Any, s: Any, result: Any, COLS: tl.constexpr) -> None:  # noqa: N803 -- as in the source
        """Write where a tile of one row finds its values in an image, -1 where none exists."""
        offsets, exists, _ = reduced_tile(tile, 0, 1, 1, s, False, 1, COLS, 1)
        tl.store(result + tl.arange(0, COLS)[None, :], tl.where(exists, offsets, -1))


def test_image_of_almost_2_31_positions_has_its_last_tile_at_its_end() -> None:
    result = torch.zeros(64, dtype=torch.int64)
    kernel: Any = _write_offsets
    with interpreting():
        kernel[(1,)](2**25 - 1, 2**31 - 1, result, COLS=64)
    assert result.tolist() == [*range(2**31 - 64, 2**31 - 1), -1]


def test_grid_holds_any_number_of_channels() -> None:
    # A grid has up to 65535 programs along its second axis.
    for c in (64 * 65535, 64 * 65535 + 1, 2**24 + 1):
        plan = launch._plan(torch.empty(2, c, device="meta"), elementwise=True)  # pyright: ignore[reportPrivateUsage] -- nothing public tells
        assert plan.grid[1] <= 65535
        assert plan.grid[1] * plan.tile["COLS"] >= c
        assert plan.grid[0] * plan.tile["ROWS"] >= 2
