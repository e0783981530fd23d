"""Derivatives of every order and mode, over all ranks, against one process.

The ranks' outputs y depend on all ranks' inputs x. With J[q, s] = ∂y_q/∂x_s, what a rank r gets is

- in forward mode, where each rank s passes a tangent t_s: Σ_s J[r, s]·t_s;
- in reverse mode, where each rank q passes a cotangent v_q: Σ_q J[q, r]ᵀ·v_q.

Jacobians take the same unit vector on all ranks, and are sums of blocks therefore. A parameter is
each rank's own: it acts on that rank's output alone, and gets the gradient of that output alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.nn import functional

import syncbn
from syncbn.errors import InputError
from tests.support.tolerance import assert_as_exact
from tests.support.world import run_world

ROWS, CHANNELS = 3, 2
EPS = 1e-5
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Options:
    """Of a layer: whether it has parameters, a ReLU, a residual."""

    affine: bool = True
    relu: bool = False
    residual: bool = False


def _normalize(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return (W, N, C), normalized over W and N.

    By plain operations, because derivatives of torch's batch norm are wrong from the second one of
    a forward-mode derivative on (torch 2.11 to 2.14), and those beyond the second are missing.
    """
    deviations = x - x.mean((0, 1))
    y = deviations / (deviations.square().mean((0, 1)) + EPS).sqrt()
    return y if weight is None or bias is None else y * weight + bias


OPTIONS = (
    Options(),
    Options(affine=False),
    Options(relu=True),
    Options(residual=True),
    Options(relu=True, residual=True),
)


class _Rank:
    """What one rank computes, and what one process does for all of them.

    Tensors of the whole batch have the ranks as their first axis.

    Attributes:
        number: the rank.
        x: the whole batch.
        tangent: of the whole batch.
        cotangent: of its outputs.
        weight, bias: the parameters, the same on all ranks.
        layer: the layer under test, without running statistics, which transforms cannot change.
    """

    def __init__(self, options: Options, dtype: torch.dtype = torch.float64) -> None:
        world_size = dist.get_world_size()
        self.number = dist.get_rank()
        self.options = options
        generator = torch.Generator().manual_seed(0)
        shape = 3, world_size, ROWS, CHANNELS
        values = torch.randn(*shape, dtype=torch.float64, generator=generator)
        self.x, self.tangent, self.cotangent = values.to(dtype)
        self.weight, self.bias = torch.tensor([[0.7, 1.2], [0.3, -0.4]], dtype=dtype)
        self.layer = syncbn.SyncBatchNorm(
            CHANNELS,
            affine=options.affine,
            track_running_stats=False,
            relu=options.relu,
            dtype=dtype,
        )
        if options.affine:
            with torch.no_grad():
                self.layer.weight.copy_(self.weight)
                self.layer.bias.copy_(self.bias)

    def own(self, whole: Tensor) -> Tensor:
        """Return a copy of this rank's part of what the ranks have together."""
        return whole[self.number].clone()

    def output(self, x: Tensor) -> Tensor:
        """Return the layer's output for this rank's input."""
        return self.layer(x, x.cos()) if self.options.residual else self.layer(x)

    def loss(self, x: Tensor) -> Tensor:
        """Return this rank's share of the loss."""
        return (self.own(self.cotangent) * self.output(x).pow(3)).sum()

    def outputs(self, x: Tensor) -> Tensor:
        """Return all ranks' outputs."""
        affine = (self.weight, self.bias) if self.options.affine else ()
        y = _normalize(x, *affine)
        if self.options.residual:
            y = y + x.cos()
        return y.relu() if self.options.relu else y

    def outputs_of_torch(self, x: Tensor) -> Tensor:
        """Return all ranks' outputs, as nn.BatchNorm computes them in the input's dtype."""
        affine = (self.weight, self.bias) if self.options.affine else (None, None)
        y = functional.batch_norm(x.flatten(0, 1), None, None, *affine, True, 0.0, EPS)
        y = y.reshape(x.shape)
        if self.options.residual:
            y = y + x.cos()
        return y.relu() if self.options.relu else y

    def total_loss(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' losses."""
        return (self.cotangent * self.outputs(x).pow(3)).sum()

    def jacobian(self) -> Tensor:
        """Return ∂y[q, k]/∂x[s, j], as (q, k, s, j), with rows and channels as one axis."""
        return jacrev(self.outputs)(self.x).reshape(2 * (len(self.x), ROWS * CHANNELS))

    def second(self) -> Tensor:
        """Return ∂²y[q, k]/∂x[s, j]∂x[p, i], as (q, k, s, j, p, i)."""
        found = jacrev(jacrev(self.outputs))(self.x)
        return found.reshape(3 * (len(self.x), ROWS * CHANNELS))

    def curvature(self) -> Tensor:
        """Return ∂²L/∂x[s, j]∂x[p, i], as (s, j, p, i)."""
        return hessian(self.total_loss)(self.x).reshape(2 * (len(self.x), ROWS * CHANNELS))


def _assert_close(ours: Tensor, truth: Tensor, what: object) -> None:
    # float64 against float64, through a handful of sums of up to 18 terms of the size of 10.
    torch.testing.assert_close(
        ours.reshape(truth.shape), truth, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}"
    )


def _along(function: Any, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the derivative of a function along tangents of its inputs."""
    return jvp(function, inputs, tangents)[1]


def _jvp(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = _along(rank.output, (rank.own(rank.x),), (rank.own(rank.tangent),))
    return ours, rank.own(_along(rank.outputs, (rank.x,), (rank.tangent,)))


def _vjp(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = vjp(rank.output, rank.own(rank.x))[1](rank.own(rank.cotangent))
    return ours[0], rank.own(vjp(rank.outputs, rank.x)[1](rank.cotangent)[0])


def _dual_numbers(rank: _Rank) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(rank.own(rank.x), rank.own(rank.tangent))
        ours = forward_ad.unpack_dual(rank.output(x)).tangent
    assert ours is not None
    return ours, rank.own(_along(rank.outputs, (rank.x,), (rank.tangent,)))


def _gradient_of_a_tangent(rank: _Rank) -> tuple[Tensor, Tensor]:
    def along(function: Function, tangent: Tensor, cotangent: Tensor) -> Function:
        return lambda x: (_along(function, (x,), (tangent,)).pow(2) * cotangent).sum()

    mine = along(rank.output, rank.own(rank.tangent), rank.own(rank.cotangent))
    total = along(rank.outputs, rank.tangent, rank.cotangent)
    return grad(mine)(rank.own(rank.x)), rank.own(grad(total)(rank.x))


def _tangent_of_a_gradient(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = _along(grad(rank.loss), (rank.own(rank.x),), (rank.own(rank.tangent),))
    truth = _along(grad(rank.total_loss), (rank.x,), (rank.tangent,))
    return ours, rank.own(truth)


def _jacfwd(rank: _Rank) -> tuple[Tensor, Tensor]:
    return jacfwd(rank.output)(rank.own(rank.x)), rank.own(rank.jacobian()).sum(1)


def _jacrev(rank: _Rank) -> tuple[Tensor, Tensor]:
    return jacrev(rank.output)(rank.own(rank.x)), rank.jacobian().sum(0)[:, rank.number]


def _hessian(rank: _Rank) -> tuple[Tensor, Tensor]:
    # Forward over reverse: this rank's gradient, along the unit vectors of all ranks.
    return hessian(rank.loss)(rank.own(rank.x)), rank.own(rank.curvature()).sum(1)


def _functional_hessian(rank: _Rank) -> tuple[Tensor, Tensor]:
    # Reverse over reverse: all ranks' gradients, differentiated by this rank's input.
    find: Any = torch.autograd.functional.hessian
    return find(rank.loss, rank.own(rank.x)), rank.curvature().sum(0)[:, rank.number]


def _vectorized_hessian(rank: _Rank) -> tuple[Tensor, Tensor]:
    find: Any = torch.autograd.functional.hessian
    ours = find(rank.loss, rank.own(rank.x), vectorize=True)
    return ours, rank.curvature().sum(0)[:, rank.number]


def _vectorized_hessian_forward(rank: _Rank) -> tuple[Tensor, Tensor]:
    find: Any = torch.autograd.functional.hessian
    options = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    return find(rank.loss, rank.own(rank.x), **options), rank.own(rank.curvature()).sum(1)


def _jacrev_of_jacrev(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = jacrev(jacrev(rank.output))(rank.own(rank.x))
    return ours, rank.second().sum((0, 2))[:, :, rank.number]


def _jacfwd_of_jacrev(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = jacfwd(jacrev(rank.output))(rank.own(rank.x))
    return ours, rank.second().sum((0, 4))[:, rank.number]


def _jacrev_of_jacfwd(rank: _Rank) -> tuple[Tensor, Tensor]:
    ours = jacrev(jacfwd(rank.output))(rank.own(rank.x))
    return ours, rank.second().sum((0, 2))[:, :, rank.number]


def _batched_gradients(rank: _Rank) -> tuple[Tensor, Tensor]:
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None, None]
    x = rank.own(rank.x).requires_grad_()
    cotangents = factors * rank.own(rank.cotangent) + factors.square()
    (ours,) = torch.autograd.grad(rank.output(x), x, cotangents, is_grads_batched=True)
    whole = rank.x.clone().requires_grad_()
    y = rank.outputs(whole)
    alone = [
        torch.autograd.grad(y, whole, factor * rank.cotangent + factor**2, retain_graph=True)[0]
        for factor in factors
    ]
    return ours, torch.stack([rank.own(gradient) for gradient in alone])


def _double_backward(rank: _Rank) -> tuple[Tensor, Tensor]:
    def penalized(x: Tensor, loss: Function) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (again,) = torch.autograd.grad(slope.pow(3).sum() + loss(x), x, create_graph=True)
        return torch.autograd.grad(again.square().sum(), x)[0]  # the third derivative

    ours = penalized(rank.own(rank.x), rank.loss)
    return ours, rank.own(penalized(rank.x, rank.total_loss))


OPERATIONS: dict[str, Callable[[_Rank], tuple[Tensor, Tensor]]] = {
    operation.__name__.strip("_").replace("_", " "): operation
    for operation in (
        _jvp,
        _vjp,
        _dual_numbers,
        _gradient_of_a_tangent,
        _tangent_of_a_gradient,
        _jacfwd,
        _jacrev,
        _hessian,
        _functional_hessian,
        _vectorized_hessian,
        _vectorized_hessian_forward,
        _jacrev_of_jacrev,
        _jacfwd_of_jacrev,
        _jacrev_of_jacfwd,
        _batched_gradients,
        _double_backward,
    )
}
# torch warns of operations, in its own layer too, that it differentiates or batches one by one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]


def _of_torch(x: Tensor) -> Tensor:
    weight, bias = torch.tensor([[0.7, 1.2], [0.3, -0.4]], dtype=x.dtype)
    return functional.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def test_truth_is_torchs_batch_norm_where_that_is_right() -> None:
    x = torch.randn(6, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.tensor([[0.7, 1.2], [0.3, -0.4]], dtype=torch.float64)

    def truth(x: Tensor) -> Tensor:
        return _normalize(x[None], weight, bias)[0]

    _assert_close(truth(x), _of_torch(x), "y")
    for transform in (jacfwd, jacrev):
        _assert_close(transform(truth)(x), transform(_of_torch)(x), "first")
        second = transform(jacrev(truth))(x)
        _assert_close(second, transform(jacrev(_of_torch))(x), "second")
        _assert_close(transform(jacfwd(truth))(x), second, "second, of a forward one")


def _as_one_process(names: list[str]) -> None:
    torch.manual_seed(0)
    for name in names:
        for options in OPTIONS:
            ours, truth = OPERATIONS[name](_Rank(options))
            _assert_close(ours, truth, f"{name}, {options}")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivative_is_that_of_one_process(name: str, world_size: int) -> None:
    run_world(world_size, _as_one_process, [name])


def test_derivatives_are_those_of_one_process_on_three_ranks() -> None:
    run_world(3, _as_one_process, list(OPERATIONS))


def _of_parameters() -> None:
    rank = _Rank(Options())
    number, x = rank.number, rank.own(rank.x)

    def output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(x, weight, bias, eps=EPS)[0]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (rank.own(rank.cotangent) * output(x, weight, bias).pow(3)).sum()

    def outputs(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        """Return all ranks' outputs, each with parameters of its own."""
        return _normalize(x) * weights[:, None] + biases[:, None]

    def losses(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        return (rank.cotangent * outputs(x, weights, biases).pow(3)).sum((1, 2))

    world_size = len(rank.x)
    weights, biases = (each.repeat(world_size, 1) for each in (rank.weight, rank.bias))
    inputs, all_inputs = (x, rank.weight, rank.bias), (rank.x, weights, biases)
    tangents = torch.arange(2.0 * world_size, dtype=torch.float64).reshape(world_size, 2) - 1

    # The tangent of a rank's parameters reaches its own output alone.
    own = rank.own(rank.tangent), tangents[number], -tangents[number]
    ours = _along(output, inputs, own)
    truth = _along(outputs, all_inputs, (rank.tangent, tangents, -tangents))
    _assert_close(ours, truth[number], "jvp")
    for argument in (1, 2):
        local = jacrev(outputs, argument)(*all_inputs)[number, :, :, number]
        for transform in (jacfwd, jacrev):
            _assert_close(transform(output, argument)(*inputs), local, f"{transform} {argument}")

    # M[q, c, s, i] = ∂²L_q/∂w_q[c]∂x_s[i]: a rank's loss depends on its own weight alone.
    mixed = torch.stack(
        [
            jacrev(jacrev(losses, 1), 0)(*all_inputs)[q, q].reshape(CHANNELS, world_size, -1)
            for q in range(world_size)
        ]
    )
    by_weight, by_input = grad(loss, 1), grad(loss, 0)
    _assert_close(jacfwd(by_weight, 0)(*inputs), mixed[number].sum(1), "forward, ∂w then ∂x")
    _assert_close(jacrev(by_weight, 0)(*inputs), mixed.sum(0)[:, number], "reverse, ∂w then ∂x")
    _assert_close(
        jacfwd(by_input, 1)(*inputs).flatten(0, 1), mixed.sum(0)[:, number].T, "forward, ∂x then ∂w"
    )
    # The backward pass takes the weight to be the same on all ranks, so that their gradients of it
    # add up to that of the one weight.
    ours = jacrev(by_input, 1)(*inputs).flatten(0, 1).detach().contiguous()
    dist.all_reduce(ours)
    _assert_close(ours, mixed.sum((0, 2)).T, "reverse, ∂x then ∂w")


def _tangent_of_a_tangent() -> None:
    rank = _Rank(Options())
    with pytest.raises(InputError, match=r"tangents of tangents, .*; take jacfwd\(jacrev\(f\)\)"):
        jacfwd(jacfwd(rank.output))(rank.own(rank.x))


def test_tangent_of_a_tangent_is_refused_since_torch_would_take_it_for_zero() -> None:
    run_world(2, _tangent_of_a_tangent)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_derivatives_by_parameters_stay_with_their_rank(world_size: int) -> None:
    run_world(world_size, _of_parameters)


def _of_the_training_layer(dtype: torch.dtype) -> None:
    for options in OPTIONS:
        rank, exact = _Rank(options, dtype), _Rank(options)
        exact.x, exact.tangent = rank.x.double(), rank.tangent.double()
        exact.weight, exact.bias = rank.weight.double(), rank.bias.double()
        layer, plain = (
            syncbn.SyncBatchNorm(CHANNELS, affine=options.affine, relu=options.relu).to(dtype)
            for _ in range(2)
        )
        if options.affine:
            for each in (layer, plain):
                each.load_state_dict(rank.layer.state_dict(), strict=False)
        x = rank.own(rank.x)
        expected = plain(x, x.cos() if options.residual else None)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, rank.own(rank.tangent))
            y = layer(dual, dual.cos() if options.residual else None)
            primal, tangent = forward_ad.unpack_dual(y)
            for name, buffer in layer.named_buffers():
                assert forward_ad.unpack_dual(buffer).tangent is None, name
        assert tangent is not None
        assert primal.dtype == tangent.dtype == dtype
        truth = _along(exact.outputs, (exact.x,), (exact.tangent,))
        rounded = _along(rank.outputs_of_torch, (rank.x,), (rank.tangent,))
        where = f"{options}, {dtype}:"
        assert_as_exact(primal, exact.own(exact.outputs(exact.x)), expected, f"{where} y")
        # The tangent is a difference of terms that are as large as the normalized tangents.
        terms = truth.abs().max().item() + 3 * rank.tangent.abs().max().item()
        assert_as_exact(tangent, exact.own(truth), rank.own(rounded), f"{where} tangent", terms)
        for (name, mine), other in zip(
            layer.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7, msg=f"{where} {name}")


def _of_all_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        _of_the_training_layer(dtype)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dual_numbers_pass_the_layer_that_tracks_statistics_in_every_dtype(world_size: int) -> None:
    run_world(world_size, _of_all_dtypes)
