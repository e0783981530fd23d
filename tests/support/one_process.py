"""A batch shared among ranks, and what one process computes on all of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """Batches of several steps, split over ranks.

    Attributes:
        shapes: each rank's input shape, (N, CHANNELS, *); N may be 0 and spatial sizes may differ.
        dtype: of inputs and upstream gradients.
        options: keyword arguments of the layer.
        layout: contiguous, channels_last for 4-D shapes, channels_last_3d for 5-D ones, or None for
            the strides of a slice of something larger.
        parameters: the layer's dtype; None for float32, or float64 with float64 inputs.
        steps: how many batches.
        residual: whether something is added to y.
        relu: whether max(·, 0) is taken of that.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    layout: torch.memory_format | None = torch.contiguous_format
    parameters: torch.dtype | None = None
    steps: int = 3
    residual: bool = False
    relu: bool = False

    def share(self, rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a rank's input, upstream gradient, and residual at a step."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x, dy, residual = (
            torch.randn(self.shapes[rank], dtype=torch.float64, generator=generator)
            for _ in range(3)
        )
        x = (2 * x + 1 + rank).to(self.dtype)  # the ranks' means differ
        dy, residual = dy.to(self.dtype), residual.to(self.dtype)
        if self.layout is None:
            return torch.stack([x, x + 1], dim=-1)[..., 0], dy, residual
        return x.contiguous(memory_format=self.layout), dy, residual

    def layer_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of parameters and statistics where inputs have a dtype."""
        return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Outcome:
    """What a layer computed: tensors of each step by rows of channels; the rest at the end."""

    y: list[Tensor]
    dx: list[Tensor]
    dresidual: list[Tensor]
    state: dict[str, Tensor]
    gradients: dict[str, Tensor]


def rows(x: Tensor) -> Tensor:
    """Return (N, C, *) as (N·S, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def initialize(layer: nn.Module) -> None:
    """Give a layer's parameters values that differ by channel."""
    generator = torch.Generator().manual_seed(42)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(CHANNELS, generator=generator))


def plain_norm(kind: type[nn.Module], *, bias: bool = True, **options: Any) -> nn.Module:
    """Return a layer of torch's; `bias=False` is not an argument of theirs in torch 2.11."""
    layer = kind(CHANNELS, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def outcome(
    layer: nn.Module, y: list[Tensor], dx: list[Tensor], dresidual: list[Tensor]
) -> Outcome:
    """Gather what a layer holds after its last step."""
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    return Outcome(y, dx, dresidual, state, gradients)


def in_one_process(case: Case, dtype: torch.dtype, reverse: bool = False) -> Outcome:
    """Return what nn.BatchNorm1d computes on the ranks' concatenated batches, in a dtype.

    With `reverse`, the rows are summed in the opposite order, and returned in their own.
    Parameters and statistics are float64 for float64, else float32, as the layers under test have.
    """
    layer = plain_norm(nn.BatchNorm1d, **case.options)
    initialize(layer)
    layer.to(case.parameters).to(case.layer_dtype(dtype))
    ys: list[Tensor] = []
    dxs: list[Tensor] = []
    dresiduals: list[Tensor] = []
    order = [0] if reverse else []
    for step in range(case.steps):
        shares = [case.share(rank, step) for rank in range(len(case.shapes))]
        x, dy, residual = (
            torch.cat([rows(tensor) for tensor in tensors]).to(dtype).flip(order).requires_grad_()
            for tensors in zip(*shares, strict=True)
        )
        y: Tensor = layer(x)
        if case.residual:
            y = y + residual
        if case.relu:
            y = y.relu()
        y.backward(dy.detach())
        assert x.grad is not None
        ys.append(y.detach().flip(order))
        dxs.append(x.grad.flip(order))
        if residual.grad is not None:
            dresiduals.append(residual.grad.flip(order))
    return outcome(layer, ys, dxs, dresiduals)
