"""What one training step of a model computes, and that of two models compared."""

from typing import Any

import torch
from torch import Tensor, nn


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
