"""What every use of an exchange has from it: layers, gradients and baselines alike."""

import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.baselines import Renormalizer, StatisticsPenalty, Unit
from syncbn.comm.exchange import Memory
from syncbn.environment import DEBUG
from syncbn.errors import InputError, ReplicaError
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 4


class _Use(ABC):
    """One use of the exchange: what it makes of this rank's rows, and of the whole batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class _Layer(_Use):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer.double()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _leaf(x)
        y = self.forward(x)
        y.pow(3).sum().backward()
        assert x.grad is not None
        running = torch.cat([buffer.flatten() for buffer in self.layer.buffers()])
        return torch.cat([y.detach(), x.grad], 1), running

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _BatchNorm(_Layer):
    def __init__(self) -> None:
        super().__init__(syncbn.SyncBatchNorm(CHANNELS))


class _Checkpointed(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.layer, x, use_reentrant=False)
        return y


class _Whitening(_Layer):
    def __init__(self) -> None:
        super().__init__(syncbn.SyncWhitening(CHANNELS, group_size=2))


class _Renormalized(_Use):
    def __init__(self) -> None:
        self.unit = nn.Identity()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = torch.eye(CHANNELS).double(), torch.zeros(CHANNELS).double()
        units = {"unit": Unit(weight, bias, self.unit)}
        Renormalizer(units).step(lambda: self.unit(x))
        return x @ weight.T + bias, torch.cat([weight.flatten(), bias])


class _Penalized(_Use):
    def __init__(self) -> None:
        self.unit = nn.Identity()
        self.penalty = StatisticsPenalty({"unit": self.unit}, 1.0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _leaf(x)
        with self.penalty.watch():
            self.unit(x)
        value = self.penalty.value()
        (gradient,) = torch.autograd.grad(value, x)
        return gradient, value.detach().reshape(1)


ABOUT_SHIFT: dict[str, type[_Use]] = {
    "SyncBatchNorm": _BatchNorm,
    "SyncBatchNorm, checkpointed": _Checkpointed,
    "SyncWhitening": _Whitening,
    "Renormalizer": _Renormalized,
}
USES = {**ABOUT_SHIFT, "StatisticsPenalty": _Penalized}


def _rows(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return rank + torch.randn(6 + rank, CHANNELS, dtype=torch.float64, generator=generator)


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(x.is_floating_point())


@contextmanager
def _first_shift(value: float) -> Generator[list[Memory]]:
    """Let the first memory that is made begin with a shift; collect all of them."""
    memories: list[Memory] = []
    make = Memory.__init__

    def begin(self: Memory, *arguments: Any) -> None:
        make(self, *arguments)
        if not memories:
            self.shift.fill_(value)
        memories.append(self)

    with mock.patch.object(Memory, "__init__", begin):
        yield memories


def _with_shifts(name: str, shifts: list[float]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return what a use gives, the shift afterwards, and how often it sums in each of two calls."""
    rank = dist.get_rank()
    counts: list[int] = []
    with _first_shift(shifts[rank]) as memories:
        use = USES[name]()
        with recorded_all_reduces() as sent:
            found = use(_rows(rank))
        counts.append(len(sent))
        shift = memories[0].shift.clone()
        with recorded_all_reduces() as sent:
            use(_rows(rank))
        counts.append(len(sent))
    return *found, shift, counts


@pytest.mark.parametrize("name", ABOUT_SHIFT)
def test_ranks_with_other_shifts_sum_once_more_exactly_and_agree_again(name: str) -> None:
    whole = torch.cat([_rows(rank) for rank in range(3)])
    of_rows, of_batch = USES[name]()(whole)
    sums = 1 if name == "Renormalizer" else 2  # those have no backward
    for shifts, counts in (([0.5, 0.5, 0.5], [sums, sums]), ([0.5, 7, 0.5], [sums + 1, sums])):
        parts = run_world(3, _with_shifts, name, shifts)
        ours = torch.cat([part[0] for part in parts])
        torch.testing.assert_close(ours, of_rows, rtol=1e-10, atol=1e-10)
        for _, theirs, shift, sent in parts:
            torch.testing.assert_close(theirs, of_batch, rtol=1e-10, atol=1e-10)
            assert torch.equal(theirs, parts[0][1])
            assert torch.equal(shift, parts[0][2])
            torch.testing.assert_close(shift, whole.mean(0), rtol=1e-12, atol=1e-12)
            assert sent == counts


def _units_in_another_order() -> str:
    model = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
    penalty = StatisticsPenalty(dict(model.items()), 1.0)
    with penalty.watch(), pytest.raises(ReplicaError) as caught:
        model["ab"[dist.get_rank()]](_rows(0))
    return str(caught.value)


def test_tags_of_different_units_are_an_error_that_names_them() -> None:
    for text in run_world(2, _units_in_another_order):
        assert "rank 0 is at the forward of 'a'" in text
        assert "rank 1 is at the forward of 'b'" in text


def _sent_alone(name: str) -> int:
    with recorded_all_reduces() as sent:
        USES[name]()(_rows(0))
    return len(sent)


@pytest.mark.parametrize("name", USES)
def test_nothing_is_sent_in_a_world_of_one(name: str) -> None:
    assert run_world(1, _sent_alone, name) == [0]


def _refused(checked: bool) -> list[str]:
    texts: list[str] = []
    with mock.patch.dict(os.environ, {DEBUG: "3"} if checked else {}):
        for use in USES.values():
            x = _rows(0)
            wrong = dist.get_rank() == 1
            with pytest.raises(InputError if wrong else ReplicaError) as caught:
                use()(x.long() if wrong else x)
            texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("checked", [False, True])
def test_every_use_tells_the_other_ranks_why_it_refuses(checked: bool) -> None:
    others, own = run_world(2, _refused, checked)
    for other, reason in zip(others, own, strict=True):
        assert reason == "expected a floating-point input, got torch.int64; convert it first"
        assert "rank 1 is at the forward of" in other
        assert f"refuses its input: {reason}" in other


def _refused_without_channels() -> str:
    unit = nn.Identity()
    penalty = StatisticsPenalty({"unit": unit}, 1.0)
    wrong = dist.get_rank() == 1
    with penalty.watch(), pytest.raises(InputError if wrong else ReplicaError) as caught:
        unit(torch.zeros(4) if wrong else torch.zeros(4, 3))  # it cannot tell how many units
    return str(caught.value)


def test_rank_that_refuses_says_why_even_if_its_sum_fails() -> None:
    other, own = run_world(2, _refused_without_channels)
    assert own.startswith("expected an input of shape (N, C, *), got (4,)")
    assert "vectors of different sizes" in other
