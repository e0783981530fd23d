"""The kernels in Triton on a GPU pass the suite that every set of kernels passes."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.kernels.protocol import Kernels, Masking, Normalization
from syncbn.mark import Mark, Marks
from syncbn.moments import Moments
from tests.contracts.test_kernels import *  # noqa: F403 -- the suite, with the kernels of this file
from tests.support.gpu import DEVICE, ON_GPU, needs_gpu

pytestmark = needs_gpu


class _OnGpu(Kernels):
    """Kernels for tensors on the CPU, which compute on the GPU."""

    def __init__(self) -> None:
        from syncbn.kernels.triton import TritonKernels

        self._kernels = TritonKernels()
        self.parameter_dtypes = self._kernels.parameter_dtypes
        self.masks = self._kernels.masks

    def local_moments(self, x: Tensor) -> Moments:
        return Moments(self._kernels.local_moments(_there(x)).packed.cpu())

    def row(self, x: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Tensor:
        with _marked(mark) as there:
            return self._kernels.row(_there(x), _there(shift), there).cpu()

    def merge(self, rows: Tensor, shift: Tensor | None, mark: Mark | None = None) -> Moments:
        moved = _there(shift)
        with _marked(mark) as there:
            packed = self._kernels.merge(_there(rows), moved, there).packed.cpu()
        _back(shift, moved)
        return Moments(packed)

    def normalization(
        self,
        moments: Moments,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        eps: float,
    ) -> Normalization:
        on_gpu = Moments(_there(moments.packed))
        norm = self._kernels.normalization(on_gpu, _there(weight), _there(bias), relu, eps)
        return Normalization(norm.statistics.cpu(), weight, bias, relu)

    def normalize(self, x: Tensor, norm: Normalization, residual: Tensor | None = None) -> Tensor:
        return self._kernels.normalize(_there(x), _norm_there(norm), _there(residual)).cpu()

    def backward_reduce(self, dy: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        return self._kernels.backward_reduce(_there(dy), _there(x), _norm_there(norm)).cpu()

    def backward_input(self, dy: Tensor, x: Tensor, norm: Normalization, sums: Tensor) -> Tensor:
        by = _norm_there(norm)
        return self._kernels.backward_input(_there(dy), _there(x), by, _there(sums)).cpu()

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        norm: Normalization,
        dweight: Tensor | None,
        dbias: Tensor | None,
        add_up: Callable[[Tensor], Tensor] | None,
        marks: Marks | None = None,
        masking: Masking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        pinned = None if marks is None else _reachable(marks.before.slot)

        def add_up_there(sums: Tensor) -> Tensor:
            _wait()
            if marks is not None and pinned is not None:
                marks.before.slot.copy_(pinned)
            assert add_up is not None
            return _there(add_up(sums))

        there = None
        if marks is not None and pinned is not None:
            before, after = marks
            there = Marks(Mark(pinned, before.number), Mark(pinned, after.number))
        moved = _there(dweight), _there(dbias)
        mask = None
        if masking is not None:
            mask = Masking(_there(masking.output), _there(masking.masked))
        sums, dx = self._kernels.gradients(
            _there(dy),
            _there(x),
            _norm_there(norm),
            *moved,
            None if add_up is None else add_up_there,
            there,
            mask,
        )
        sums = sums.cpu()
        if masking is not None and mask is not None:
            masking.masked.copy_(mask.masked)
        _wait()
        if marks is not None and pinned is not None:
            marks.after.slot.copy_(pinned)
        for ours, theirs in zip((dweight, dbias), moved, strict=True):
            _back(ours, theirs)
        return sums, None if dx is None else dx.cpu()

    def update_running(
        self,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        momentum: float | None,
    ) -> None:
        buffers = running_mean, running_var, num_batches_tracked
        moved = _there(running_mean), _there(running_var), _there(num_batches_tracked)
        on_gpu = Moments(_there(moments.packed.detach()))
        self._kernels.update_running(on_gpu, *moved, momentum)
        with torch.no_grad():
            for ours, theirs in zip(buffers, moved, strict=True):
                _back(ours, theirs)


@contextmanager
def _marked(mark: Mark | None) -> Generator[Mark | None]:
    """Give a mark in memory that the GPU can reach, whose number arrives where it shall be."""
    if mark is None:
        yield None
        return
    pinned = _reachable(mark.slot)
    yield Mark(pinned, mark.number)
    _wait()
    mark.slot.copy_(pinned)


def _reachable(slot: Tensor) -> Tensor:
    return slot.clone().pin_memory() if ON_GPU else slot.clone()


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _there(tensor: Any) -> Any:
    """Return a tensor on the GPU, with the strides that it has, as far as they leave no gaps."""
    return None if tensor is None else tensor.to(DEVICE) if ON_GPU else tensor.clone()


def _back(ours: Tensor | None, theirs: Tensor | None) -> None:
    if ours is not None and theirs is not None:
        ours.copy_(theirs)


def _norm_there(norm: Normalization) -> Normalization:
    statistics, weight, bias = map(_there, norm[:3])
    return Normalization(statistics, weight, bias, norm.relu)


@pytest.fixture
def kernels() -> Kernels:
    """The kernels in Triton, on a GPU."""
    return _OnGpu()
