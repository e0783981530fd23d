from typing import Any

import pytest
import torch

from syncbn.train.generators import KeptGenerators, generator_states, restore_generators

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class _FakeGpu:
    """The generator of a GPU that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = torch.tensor([1], dtype=torch.uint8)
        self.asked: list[Any] = []
        monkeypatch.setattr(torch.cuda, "get_rng_state", self._get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _get(self, device: torch.device) -> torch.Tensor:
        self.asked.append(device)
        return self.state.clone()

    def _set(self, state: torch.Tensor, device: torch.device) -> None:
        self.asked.append(device)
        self.state = state.clone()


def test_generator_of_the_ranks_own_gpu_is_kept_and_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = _FakeGpu(monkeypatch)
    kept, states = KeptGenerators(GPU), generator_states(GPU)
    before = torch.rand(3)
    for restore in (kept.restore, lambda: restore_generators(states, GPU)):
        gpu.state = torch.tensor([7], dtype=torch.uint8)
        restore()
        assert torch.equal(torch.rand(3), before)
        assert gpu.state.item() == 1
    assert set(gpu.asked) == {GPU}


def test_on_the_cpu_no_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _FakeGpu(monkeypatch)
    KeptGenerators(CPU).restore()
    states = generator_states(CPU)
    assert "cuda" not in states
    restore_generators(states | {"cuda": gpu.state}, CPU)
    restore_generators(states, GPU)  # a checkpoint of a run on the CPU goes on on a GPU
    assert gpu.asked == []
