"""What one training step of a model computes, and that of two models compared."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn


def results_of_step(model: nn.Module, *inputs: Tensor) -> list[Any]:
    """Return all that a step computes: output, gradients, and the state dict afterwards."""
    model.zero_grad()
    given = [each.clone().requires_grad_() for each in inputs]
    output = model(*given)
    output.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [output.detach(), *(x.grad for x in given), gradients, dict(model.state_dict())]


def assert_same_step(ours: nn.Module, truth: nn.Module, *inputs: Tensor) -> None:
    """Fail unless two models compute the same in a step, and have the same state after it."""
    torch.testing.assert_close(
        results_of_step(ours, *inputs), results_of_step(truth, *inputs), rtol=1e-9, atol=1e-9
    )


def fused_calls(model: nn.Module, *inputs: Tensor) -> int:
    """Return how many calls of a normalization take something along in a copy's forward."""
    calls = 0
    original = syncbn.SyncBatchNorm.forward

    def spy(self: syncbn.SyncBatchNorm, input: Tensor, residual: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += self.fuses_relu or residual is not None
        return original(self, input, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syncbn.SyncBatchNorm, "forward", spy)
        copy.deepcopy(model)(*inputs)
    return calls
