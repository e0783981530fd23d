"""What is particular to the native kernels; tests/contracts/ has what every set must do."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import _native
from syncbn.errors import InputError
from syncbn.kernels.choice import select_kernels
from syncbn.kernels.native import NativeKernels
from syncbn.kernels.protocol import Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import statistics_of
from tests.support.native import limited
from tests.support.tolerance import assert_as_exact

HALVES = [torch.float16, torch.bfloat16]

levels = pytest.mark.parametrize("level", [0, 1, 2])
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def _every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, -1)


def _scaled(scale: float) -> Normalization:
    """Return what multiplies a single channel."""
    return Normalization(torch.tensor([1.0, 0.0, scale]).double())


def test_a_lower_level_of_instructions_can_be_asked_for() -> None:
    with limited(0) as level:
        assert level == 0


@levels
@halves
def test_every_half_precision_value_is_read_and_written_exactly(
    level: int, dtype: torch.dtype
) -> None:
    x = _every_value(dtype)
    with limited(level):
        y = NativeKernels().normalize(x, _scaled(1.0))
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


@levels
@halves
@pytest.mark.parametrize("scale", [1 / 3, 1.9, 1e-3, 100.0])
def test_half_precision_rounds_as_torch_does(level: int, dtype: torch.dtype, scale: float) -> None:
    x = _every_value(dtype)
    with limited(level):
        y = NativeKernels().normalize(x, _scaled(scale))
    expected = (x.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(layout: torch.memory_format) -> None:
    kernels, threads = NativeKernels(), torch.get_num_threads()
    x, dy = (torch.randn(16, 48, 31, 33).contiguous(memory_format=layout) for _ in range(2))

    def compute() -> list[Tensor]:
        moments = kernels.local_moments(x)
        norm = Normalization(statistics_of(moments, 1e-5))
        sums = kernels.backward_reduce(dy, x, norm)
        outputs = kernels.normalize(x, norm), kernels.backward_input(dy, x, norm, sums)
        return [moments.packed, sums, *outputs]

    try:
        torch.set_num_threads(1)
        alone = compute()
        for many in (2, 3, 8):
            torch.set_num_threads(many)
            for mine, theirs in zip(compute(), alone, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_first_value_far_from_the_others_costs_no_digits(layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, 30, 30).contiguous(memory_format=layout)
    x[0, :, 0, 0] = 1e4
    exact = x.double()
    moments = NativeKernels().local_moments(x)
    mean = exact.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(moments.mean, mean.flatten(), rtol=1e-14, atol=1e-14)
    m2 = (exact - mean).square().sum((0, 2, 3))
    torch.testing.assert_close(moments.m2, m2, rtol=1e-13, atol=0)


def test_memory_at_any_offset_is_read() -> None:
    x = torch.randn(2 * 5 * 7 * 9 + 1)[1:].view(2, 5, 7, 9)
    assert x.data_ptr() % 8 != 0
    moments = NativeKernels().local_moments(x)
    reference = ReferenceKernels().local_moments(x)
    torch.testing.assert_close(moments.mean, reference.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.m2, reference.m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_without_a_break_to_the_native_kernels(layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, 5, 7).contiguous(memory_format=layout)
    dy = torch.randn(4, 3, 5, 7)
    results: list[list[Tensor]] = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        torch.compiler.reset()
        layer = syncbn.SyncBatchNorm(3)
        leaf = x.clone().requires_grad_()
        y = wrap(layer)(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        assert y.stride() == x.stride()
        assert layer.running_var is not None
        results.append(
            [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
        )
        results[-1].append(layer.running_var)
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_kernels() -> None:
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, 5, requires_grad=True)
    expected = layer(x).detach()
    with _Listener() as listener:
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert {f"syncbn.{name}.default" for name in ("local_moments", "normalize")} <= listener.seen
    assert {f"syncbn.backward_{name}.default" for name in ("reduce", "input")} <= listener.seen


def test_gradients_of_other_layouts_and_dtypes_of_parameters_are_taken() -> None:
    x = torch.randn(4, 3, 5, 7)
    truth_layer = torch.nn.BatchNorm2d(3).double()
    x_exact = x.double().requires_grad_()
    dy = torch.randn(4, 3, 1, 1)
    truth_layer(x_exact).backward(dy.double().expand_as(x))
    plain_layer, x_plain = torch.nn.BatchNorm2d(3), x.clone().requires_grad_()
    plain_layer(x_plain).backward(dy.expand_as(x))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, leaf = syncbn.SyncBatchNorm(3, dtype=dtype), x.clone().requires_grad_()
        layer(leaf).backward(dy.expand_as(x))
        assert leaf.grad is not None
        assert x_exact.grad is not None
        assert x_plain.grad is not None
        scale = (dy.abs().max() * (1 / x.std())).item()
        assert_as_exact(leaf.grad, x_exact.grad, x_plain.grad, "dx", scale)


class _Elsewhere(Tensor):
    """A subclass, which the library must not look into."""


def test_native_kernels_are_chosen_where_they_can_read_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    x = torch.zeros(2, 3, 4, 6)
    channels_last = x.to(memory_format=torch.channels_last)
    for y in (x, channels_last, x.half(), x.bfloat16(), nn.Parameter(x), x[:0]):
        assert isinstance(select_kernels(y, None, torch.zeros(3).double()), NativeKernels)
    for y in (x.double(), x[..., ::2], x.transpose(2, 3), x.as_subclass(_Elsewhere), x.to("meta")):
        assert isinstance(select_kernels(y), ReferenceKernels)
    for other in (x.as_subclass(_Elsewhere), x.to("meta")):
        assert isinstance(select_kernels(x, None, other), ReferenceKernels)
    assert select_kernels(x) is select_kernels(channels_last)  # none is made for each call


def test_variable_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    for choice, kind in {
        "auto": NativeKernels,
        "reference": ReferenceKernels,
        "native": NativeKernels,
    }.items():
        monkeypatch.setenv("SYNCBN_KERNELS", choice)
        assert isinstance(select_kernels(x), kind)
        assert isinstance(select_kernels(x.double()), ReferenceKernels)
    monkeypatch.setenv("SYNCBN_KERNELS", "cuda")
    with pytest.raises(
        InputError, match="SYNCBN_KERNELS is 'cuda'; set it to auto, native, triton or"
    ):
        select_kernels(x)


def test_without_the_library_the_reference_serves_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(_native, "LIBRARY", tmp_path / "libsyncbn.so")
    with caplog.at_level(logging.WARNING, "syncbn"):
        monkeypatch.setattr(_native, "library", _native._load())  # pyright: ignore[reportPrivateUsage] -- what happens on import
    (record,) = caplog.records
    assert "they were not compiled with this installation" in record.getMessage()
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    x = torch.randn(4, 3)
    assert isinstance(select_kernels(x), ReferenceKernels)
    y, moments = syncbn.sync_batch_norm(x)
    torch.testing.assert_close(y, nn.BatchNorm1d(3)(x))
    assert moments.count == 4
    layer = syncbn.SyncBatchNorm(3)
    layer(x.clone().requires_grad_()).sum().backward()
    assert layer.num_batches_tracked == 1
    monkeypatch.setenv("SYNCBN_KERNELS", "native")
    with pytest.raises(InputError, match=r"install g\+\+ or clang\+\+"):
        select_kernels(x)


def test_library_of_another_interface_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = _native.INTERFACE
    monkeypatch.setattr(_native, "INTERFACE", built + 1)
    with caplog.at_level(logging.WARNING, "syncbn"):
        assert _native._load() is None  # pyright: ignore[reportPrivateUsage] -- as above
    (record,) = caplog.records
    expected = f"they have interface {built}, and this version of syncbn wants {built + 1}"
    assert expected in record.getMessage()
