"""Inverse square roots of symmetric matrices, with a gradient where eigenvalues are equal too."""

from typing import Any

import torch
from torch import Tensor


def inverse_root(matrix: Tensor) -> Tensor:
    """Return the symmetric inverse square roots of symmetric positive definite matrices.

    Its gradient, and that one's, hold for equal eigenvalues too, where those of eigenvectors do
    not exist. No communication. Relative error: about 10⁻¹⁵·κ, for the condition number κ.

    Args:
        matrix: shape (*, D, D), float64.
    """
    root, _, _ = _InverseRoot.apply(matrix)  # pyright: ignore[reportGeneralTypeIssues] -- torch types Function.apply as Any or None
    return root


class _InverseRoot(torch.autograd.Function):
    """S to W = S^(−1/2); S⁻¹ = W² gives W·dW + dW·W = −W²·dS·W², a Lyapunov equation."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.rsqrt()
        return (vectors * roots[..., None, :]) @ vectors.mT, vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        root, vectors, roots = ctx.saved_tensors
        solution: Tensor = _Lyapunov.apply(root, grads[0], vectors, roots)  # pyright: ignore[reportAssignmentType] -- as above
        square = root @ root
        return -(square @ solution @ square)


class _Lyapunov(torch.autograd.Function):
    """(W, G) to the Z of W·Z + Z·W = G, for the eigenvectors and eigenvalues of W."""

    @staticmethod
    def forward(root: Tensor, right: Tensor, vectors: Tensor, roots: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        sums = roots[..., :, None] + roots[..., None, :]
        return vectors @ ((vectors.mT @ right @ vectors) / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        root, _, vectors, roots = inputs
        ctx.save_for_backward(root, output, vectors, roots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        root, solution, vectors, roots = ctx.saved_tensors
        back: Tensor = _Lyapunov.apply(root, grads[0], vectors, roots)  # pyright: ignore[reportAssignmentType] -- as above
        return -(back @ solution.mT + solution.mT @ back), back, None, None
