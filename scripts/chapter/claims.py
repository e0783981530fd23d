"""The claims of the chapter that this project implements, as functions to be tested.

The chapter: Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 8.7.1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

import syncbn

_DIGITS = 400

# 1. The deep linear chain


@dataclass(frozen=True)
class ChainStep:
    """What a gradient step does to ŷ = x·w₁·w₂…w_l, by the order in ε of what does it.

    Attributes:
        orders: the term of each order from 0 to l; they sum to ŷ(w − εg).
        predicted: the change by first order, −ε·gᵀg.
        actual: ŷ(w − εg) − ŷ(w).
        beyond_second: the terms of orders three and up, which a model of second order misses.
    """

    orders: Tensor
    predicted: float
    actual: float
    beyond_second: float


def chain_gradient(weights: Tensor, x: float = 1.0) -> Tensor:
    """Return g of ŷ = x·∏wᵢ: gᵢ = x·∏_{j≠i} wⱼ, shape (l,), also where a weight is 0."""
    ones = weights.new_ones(1)
    before = torch.cat([ones, weights[:-1]]).cumprod(0)
    after = torch.cat([ones, weights.flip(0)[:-1]]).cumprod(0).flip(0)
    return x * before * after


def chain_step(weights: Tensor, epsilon: float, x: float = 1.0) -> ChainStep:
    """Return the terms of ŷ(w − εg), by multiplying out ∏(wᵢ − εgᵢ) as a polynomial in ε.

    With 400 decimal digits, because terms of alternating sign cancel, and small changes vanish, in
    float64; only the results are rounded to that.

    Args:
        weights: shape (l,), float64.
        epsilon: the step.
        x: the input.
    """
    with localcontext(prec=_DIGITS):
        exact = [Decimal(value) for value in weights.tolist()]
        orders = [Decimal(x)]
        for number, weight in enumerate(exact):
            others = exact[:number] + exact[number + 1 :]
            step = -Decimal(epsilon) * math.prod(others, start=Decimal(x))
            kept, moved = [*orders, Decimal(0)], [Decimal(0), *orders]
            orders = [a * weight + b * step for a, b in zip(kept, moved, strict=True)]
        actual, left = sum(orders[1:]), sum(orders[3:])
    rounded = torch.tensor([float(order) for order in orders], dtype=torch.float64)
    return ChainStep(rounded, float(orders[1]), float(actual), float(left))


def second_order_term(weights: Tensor, epsilon: float, x: float = 1.0) -> float:
    """Return the chapter's example of a term of second order: ε²·g₁·g₂·x·∏_{i≥3} wᵢ."""
    gradient = chain_gradient(weights, x)
    return epsilon**2 * float(gradient[0] * gradient[1] * x * weights[2:].prod())


def newton_step(weights: Tensor, x: float = 1.0) -> tuple[float, float]:
    """Return the change of ŷ = x·∏wᵢ by Newton's step: what its model predicts, and the actual one.

    The step is −H⁻¹g. With Hᵢⱼ = ŷ/(wᵢwⱼ) for i ≠ j and 0 else, it is −wᵢ/(l − 1): all weights
    shrink by 1/(l − 1), to where the model of second order is stationary. The model says
    −½·gᵀH⁻¹g = −ŷ·l/(2(l − 1)); what happens is ŷ·((1 − 1/(l − 1))^l − 1), by all orders.

    Args:
        weights: shape (l,) with l of 2 or more, float64, none of them 0.
        x: the input.
    """
    layers, output = len(weights), x * float(weights.prod())
    return -output * layers / (2 * (layers - 1)), output * ((1 - 1 / (layers - 1)) ** layers - 1)


def cost_of_order(layers: int, order: int) -> int:
    """Return how many derivatives of one order an exact step needs: one for each set of weights."""
    return math.comb(layers, order)


# 2. With batch normalization the chain is easy


def train_chain(
    normalize: bool, rates: Tensor, layers: int, steps: int, seed: int, scale: float = 1.0
) -> Tensor:
    """Return the losses of linear chains of one unit a layer that learn y = 2·x by plain steps.

    With `normalize`, the last hidden unit is normalized over the batch: ŷ = w_l·ĥ_{l−1}.

    Args:
        normalize: whether ĥ or h is what the last weight scales.
        rates: learning rates, shape (k,), float64: a chain for each, which start alike.
        layers: l.
        steps: of gradient descent on ½·mean((ŷ − y)²), for 64 samples x of a standard normal.
        seed: of weights and samples.
        scale: the weights are scale·(1 + 0.1·normal).

    Returns:
        Shape (steps, k), each before a step; infinite where a chain has diverged.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 1, generator=generator, dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    noise = torch.randn(layers, 1, generator=generator, dtype=torch.float64)
    weights = (scale * (1 + 0.1 * noise)).repeat(1, len(rates)).requires_grad_()
    losses: list[Tensor] = []
    for _ in range(steps):
        hidden = x * weights[:-1].prod(0)
        if normalize:
            hidden = syncbn.sync_batch_norm(hidden, eps=1e-12)[0]
        loss = 0.5 * (weights[-1] * hidden - 2 * x).square().mean(0)
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        with torch.no_grad():
            weights -= rates * gradient
    return torch.stack(losses).nan_to_num(nan=math.inf)


# 3. What the gradient never proposes


def followed_gradient(h: Tensor, dy: Tensor, step: float, constants: bool) -> Tensor:
    """Return h − step·∂L/∂h, for a loss L of ĥ with the gradient dy.

    Args:
        h: activations of one unit, shape (n, 1), float64.
        dy: ∂L/∂ĥ, of that shape.
        step: the length of the step, in units of h² (L has none).
        constants: whether the gradient takes μ and σ for constants, as if normalizing were not part
            of the model; else it is batch normalization's.
    """
    h = h.detach().requires_grad_()
    if constants:
        normal = (h - h.detach().mean(0)) / h.detach().std(0, correction=0)
    else:
        normal = syncbn.sync_batch_norm(h, eps=1e-12)[0]
    (gradient,) = torch.autograd.grad(normal, h, dy)
    return (h - step * gradient).detach()


# 4. δ inside the root


def gradient_at_zero_variance(eps: float, dtype: torch.dtype) -> Tensor:
    """Return dx of batch normalization for a constant batch and an upstream gradient of ±1."""
    x = torch.ones(4, 1, dtype=dtype, requires_grad=True)
    layer = syncbn.SyncBatchNorm(1, eps=eps)
    layer(x).backward(torch.tensor([[1.0], [-1], [1], [-1]], dtype=dtype))
    assert x.grad is not None
    return x.grad


def gradient_with_delta_outside(delta: float, dtype: torch.dtype) -> Tensor:
    """Return what back-propagation makes of (x − μ)/(√σ² + δ), with δ outside the root.

    The quotient has a derivative there, (I − 11ᵀ/n)/δ; but the root's own is infinite.
    """
    x = torch.ones(4, 1, dtype=dtype, requires_grad=True)
    centered = x - x.mean(0)
    y = centered / (centered.square().mean(0).sqrt() + delta)
    y.backward(torch.tensor([[1.0], [-1], [1], [-1]], dtype=dtype))
    assert x.grad is not None
    return x.grad


# 5. γ and β


def gamma_and_beta_of(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return γ = σ and β = μ + bias, with which BN(x·weightᵀ) is x·weightᵀ + bias on a batch."""
    hidden = x @ weight.T
    return hidden.std(0, correction=0), hidden.mean(0) + bias


def means_while_learning(normalize: bool, lr: float, seed: int, steps: int) -> list[float]:
    """Return the mean of a unit over a batch while gradient descent moves it to 1, step by step.

    The unit is on top of eight layers of sixteen tanh units; all parameters learn. With
    `normalize`, it is BN's output, whose mean is β alone; else the bias and everything below act.

    Args:
        normalize: whether the unit is normalized.
        lr: learning rate.
        seed: of weights and samples.
        steps: of gradient descent on ½·(mean − 1)². The mean alone is what is asked for, so all
            else is free to move.

    Returns:
        steps + 1 means, the first of them before any step.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    shapes = [(16, 16)] * 8 + [(1, 16)]
    weights = [
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64) / 4).requires_grad_()
        for shape in shapes
    ]
    biases = [torch.zeros(len(w), dtype=torch.float64, requires_grad=True) for w in weights]
    gamma = torch.ones(1, dtype=torch.float64, requires_grad=True)
    parameters = [*weights, *biases, gamma]
    means: list[float] = []
    for _ in range(steps + 1):
        hidden = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = (hidden @ weight.T + bias).tanh()
        if normalize:
            unit = syncbn.sync_batch_norm(hidden @ weights[-1].T, gamma, biases[-1])[0]
        else:
            unit = hidden @ weights[-1].T + biases[-1]
        mean = unit.mean()
        means.append(mean.item())
        gradients = torch.autograd.grad(0.5 * (mean - 1) ** 2, parameters, materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
    return means


def steps_until_there(means: Sequence[float]) -> int | None:
    """Return after how many steps a mean first was within 0.01 of 1; None if it never was."""
    return next((step for step, mean in enumerate(means) if abs(mean - 1) < 0.01), None)


# 7. Convolution


class PositionNorm(nn.Module):
    """Batch normalization with a μ and a σ for each position of a feature map: a counterexample."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (x − μ)/σ, with the statistics of each (c, h, w) over the batch alone."""
        return functional.batch_norm(x.flatten(1), None, None, training=True).reshape(x.shape)


def before_and_after_moving(
    norm: Callable[[Tensor], Tensor], x: Tensor, shift: int
) -> tuple[Tensor, Tensor]:
    """Return what normalizing makes of the first of some maps, and of it moved among the others.

    Args:
        norm: from (N, C, H, W) to the same shape.
        x: shape (N, C, H, W).
        shift: in pixels along the width, around the edge; the others stay where they are.

    Returns:
        Two of shape (C, H, W): of a layer that keeps translation, the second is the first, moved.
    """
    moved = torch.cat([x[:1].roll(shift, 3), x[1:]])
    return norm(x)[0], norm(moved)[0]
