"""Layers in regions that torch.utils.checkpoint computes again in the backward pass.

Each scenario is trained twice, with checkpointing and without. The sums that the ranks send, the
running statistics and the gradients must be the same.
"""

import gc
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    GraphExecGroup,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn.errors import SyncBNError
from tests.support.tolerance import assert_as_exact
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 4
ROWS, LENGTH = 3, 5
KINDS = ("affine", "not affine", "ReLU", "residual and ReLU", "whitening", "whitening, not affine")
FORWARD_SUMS = {2 * CHANNELS + 1, 1 + CHANNELS + CHANNELS * 3 // 2}
Norm = Callable[[Tensor], Tensor]
aten: Any = torch.ops.aten


class _Block(nn.Module):
    """A layer that takes one argument, whichever layer it is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        affine = "not affine" not in kind
        self.residual = "residual" in kind
        if kind.startswith("whitening"):
            self.layer: nn.Module = syncbn.SyncWhitening(CHANNELS, group_size=2, affine=affine)
        else:
            self.layer = syncbn.SyncBatchNorm(CHANNELS, affine=affine, relu="ReLU" in kind)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.linspace(-0.3, 0.4, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.cos()) if self.residual else self.layer(x)


class _Step:
    """One training step, of whatever a scenario does, with or without checkpointing.

    Attributes:
        norm: the layer.
        checkpoints: whether `run` checkpoints.
        dtype: of inputs and parameters.
    """

    def __init__(self, kind: str, checkpoints: bool, dtype: torch.dtype) -> None:
        self.norm = _Block(kind).to(dtype)
        self.checkpoints = checkpoints
        self.dtype = dtype
        self.inputs: list[Tensor] = []

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_last_rank(self) -> bool:
        return not dist.is_initialized() or self.rank == dist.get_world_size() - 1

    def run(self, region: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Call the region on the inputs; checkpointed, if this step is."""
        if not self.checkpoints:
            return region(*inputs)
        return checkpoint(region, *inputs, use_reentrant=False, **options)

    def draw(self, seed: int, rows: int = ROWS, needs_grad: bool = True) -> Tensor:
        """Return this rank's input of a seed."""
        generator = torch.Generator().manual_seed(100 * seed + self.rank)
        x = torch.randn(rows, CHANNELS, LENGTH, generator=generator) + 0.1 * self.rank
        self.inputs.append(x.to(self.dtype).requires_grad_(needs_grad))
        return self.inputs[-1]

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of all inputs and parameters."""
        return [tensor.grad for tensor in [*self.inputs, *self.norm.parameters()]]


Scenario = Callable[[_Step], None]


def _called_twice_with_inputs_that_are_equal_on_one_rank(step: _Step) -> None:
    first, second = step.draw(0), step.draw(1)
    if step.is_last_rank:  # as in batches that are padded
        second.data.copy_(first)
    out = step.run(lambda a, b: step.norm(a.sin()) * (1 + step.norm(b.sin())), first, second)
    out.square().sum().backward()


def _called_many_times_with_equal_inputs(step: _Step) -> None:
    x = step.draw(0)
    for _ in range(2):
        out = step.run(lambda a: step.norm(a.sin()) + step.norm(a.sin()).exp(), x)
        (out + step.norm(x.sin())).square().sum().backward()


def _called_with_nothing_to_save(step: _Step) -> None:
    first, second, factor = step.draw(0, needs_grad=False), step.draw(1, needs_grad=False), 2.0

    def region(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        with torch.no_grad():
            first_of_all = step.norm(c)
        # Without affine parameters, none of these saves a tensor.
        together = step.norm(a) + factor * step.norm(b) + first_of_all
        return together * c

    step.run(region, first, second, step.draw(2)).square().sum().backward()


def _empty_on_one_rank(step: _Step) -> None:
    rows = 0 if step.is_last_rank and step.rank else ROWS
    first, second = step.draw(0, rows), step.draw(1, rows)
    out = step.run(lambda a, b: step.norm(a.sin()) * (1 + step.norm(b.sin())), first, second)
    out.square().sum().backward()


def _empty_on_all_ranks(step: _Step) -> None:
    empty, other = step.draw(0, 0), step.draw(1)
    out, _ = step.run(lambda a, b: (step.norm(b.sin()), step.norm(a.sin())), empty, other)
    out.square().sum().backward()


def _nested(step: _Step) -> None:
    def inner(x: Tensor) -> Tensor:
        return step.norm(step.norm(x.sin()).exp())

    def ends_with_it(x: Tensor) -> Tensor:
        return step.run(inner, step.norm(x.cos()))

    def goes_on(x: Tensor) -> Tensor:
        return step.norm(step.run(inner, step.norm(x.cos())).tanh()).sin()

    def calls_it_twice(x: Tensor) -> Tensor:
        return step.run(inner, step.run(inner, x).sin()).cos() + step.norm(x)

    for seed, region in enumerate((ends_with_it, goes_on, calls_it_twice)):
        step.run(region, step.draw(seed)).square().sum().backward()


def _nested_three_deep(step: _Step) -> None:
    def innermost(x: Tensor) -> Tensor:
        return step.norm(x.sin()).exp()

    def middle(x: Tensor) -> Tensor:
        return step.norm(step.run(innermost, step.norm(x.cos()))).tanh()

    def outer(x: Tensor) -> Tensor:
        return step.norm(step.run(middle, step.norm(x.exp()).sin()).cos()).sin()

    losses = [step.run(outer, step.draw(seed)).square().sum() for seed in range(2)]
    for loss in losses:
        loss.backward()


def _micro_batches_backward_in_any_order(step: _Step) -> None:
    def region(x: Tensor) -> Tensor:
        return step.norm(step.norm(x.sin()).cos()).exp()

    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        losses = [step.run(region, step.draw(seed)).square().sum() for seed in range(3)]
        step.norm(step.draw(4)).square().sum().backward()  # one that is not checkpointed
        for micro_batch in order:
            losses[micro_batch].backward()


def _backward_twice(step: _Step) -> None:
    out = step.run(lambda x: step.norm(step.norm(x.sin()).cos()).exp(), step.draw(0))
    for _ in range(3):
        out.square().sum().backward(retain_graph=True)
    step.run(lambda x: step.norm(x.sin()), step.draw(1)).square().sum().backward()
    out.sum().backward()


def _two_outputs_backward_one_after_the_other(step: _Step) -> None:
    def region(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return step.norm(a.sin()).exp(), step.norm(b.sin()).exp()

    for seed, group in ((0, nullcontext()), (2, GraphExecGroup())):
        first, second = step.run(region, step.draw(seed), step.draw(seed + 1))
        with group:
            second.square().sum().backward()
            first.square().sum().backward()


def _looked_at_outside_a_backward_pass_on_one_rank(step: _Step) -> None:
    out = step.run(lambda x: step.norm(step.norm(x.sin()).cos()).exp(), step.draw(0))
    if step.is_last_rank:
        node: Any = out.grad_fn
        assert node._saved_result is not None  # computes the region again, in no graph's task
    out.square().sum().backward()


def _hooks_inside_the_region(step: _Step) -> None:
    def region(x: Tensor) -> Tensor:
        y = step.norm(x.sin()).exp()
        with save_on_cpu():
            y = step.norm(y.cos())
        with saved_tensors_hooks(Tensor.clone, Tensor.clone):
            z = step.norm(y)
        return z.exp() * step.norm(y.sin())

    step.run(region, step.draw(0)).square().sum().backward()


def _hooks_around_the_region(step: _Step) -> None:
    with save_on_cpu():
        out = step.run(lambda x: step.norm(step.norm(x.sin()).cos()).exp(), step.draw(0))
    with save_on_cpu():
        out.square().sum().backward()


def _gradient_within_the_region(step: _Step) -> None:
    def penalized(x: Tensor) -> Tensor:
        y = step.norm(x.sin())
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return step.norm(y.cos()).exp() + slope.square()

    def guided(x: Tensor) -> Tensor:
        y = step.norm(x.sin())
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)
        return step.norm(y + slope).exp()

    for seed, region in enumerate((penalized, guided)):
        step.run(region, step.draw(seed)).square().sum().backward()


def _sequential(step: _Step) -> None:
    # A list, because nn.Sequential has a module that occurs twice among its children once.
    functions = [step.norm, torch.tanh, step.norm, step.norm, torch.exp, step.norm]
    out: Any = step.draw(0)
    if step.checkpoints:
        out = checkpoint_sequential(functions, 3, out, use_reentrant=False)
    else:
        for function in functions:
            out = function(out)
    out.square().sum().backward()


def _interrupted(step: _Step) -> None:
    interrupts = iter([False, step.checkpoints] + 10 * [False])

    def region(x: Tensor) -> Tensor:
        y = step.norm(step.norm(x.sin()).cos())
        if next(interrupts):
            raise KeyboardInterrupt
        return y.exp().exp()

    out = step.run(region, step.draw(0)).sum()
    if step.checkpoints:
        with pytest.raises(KeyboardInterrupt):
            out.backward(retain_graph=True)
        for tensor in [*step.inputs, *step.norm.parameters()]:
            tensor.grad = None
    out.backward()


def _inputs_in_half_precision(step: _Step) -> None:
    x = step.draw(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = step.run(lambda x: step.norm(step.norm(x.bfloat16().sin()).cos()), x)
    out.float().square().sum().backward()


EXACT: dict[str, Scenario] = {
    scenario.__name__.strip("_").replace("_", " "): scenario
    for scenario in (
        _called_twice_with_inputs_that_are_equal_on_one_rank,
        _called_many_times_with_equal_inputs,
        _called_with_nothing_to_save,
        _empty_on_one_rank,
        _empty_on_all_ranks,
        _nested,
        _nested_three_deep,
        _micro_batches_backward_in_any_order,
        _backward_twice,
        _two_outputs_backward_one_after_the_other,
        _looked_at_outside_a_backward_pass_on_one_rank,
        _hooks_inside_the_region,
        _hooks_around_the_region,
        _gradient_within_the_region,
        _sequential,
        _interrupted,
        _inputs_in_half_precision,
    )
}
# The gradient within a region is computed again with it, and sends its backward sums again.
SENDS_BACKWARD_SUMS_AGAIN = (_gradient_within_the_region,)


class _Outcome:
    """What a scenario did to a layer, and what it sent."""

    def __init__(
        self, scenario: Scenario, kind: str, checkpoints: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        step = _Step(kind, checkpoints, dtype)
        with recorded_all_reduces() as sent:
            scenario(step)
        self.gradients = step.gradients()
        self.state = [value.clone() for value in step.norm.state_dict().values()]
        self.sent = [vector.numel() for vector in sent]
        if scenario in SENDS_BACKWARD_SUMS_AGAIN:
            self.sent = [size for size in self.sent if size in FORWARD_SUMS]


def _assert_equal(ours: list[Tensor | None], plain: list[Tensor | None], what: str) -> None:
    for number, (mine, other) in enumerate(zip(ours, plain, strict=True)):
        same = mine is other is None or (
            mine is not None and other is not None and torch.equal(mine, other)
        )
        assert same, f"{what} {number}: {mine} with checkpointing, {other} without"


def _exactly_as_without(names: list[str], kinds: tuple[str, ...] = KINDS) -> None:
    for name, kind in itertools.product(names, kinds):
        scenario = EXACT[name]
        plain = _Outcome(scenario, kind, checkpoints=False)
        assert any(gradient is not None for gradient in plain.gradients)
        for early_stop in (True, False):
            with set_checkpoint_early_stop(early_stop):
                ours = _Outcome(scenario, kind, checkpoints=True)
            where = f"{name}, {kind}, early stop {early_stop}:"
            assert ours.sent == plain.sent, f"{where} sums of {ours.sent}, {plain.sent} without"
            for mine, other in zip(ours.state, plain.state, strict=True):
                assert torch.equal(mine, other), f"{where} statistics {mine}, {other} without"
            _assert_equal(ours.gradients, plain.gradients, f"{where} gradient")


def _in_world(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Call the function in a world of so many ranks; in this process, if of one."""
    if world_size == 1:
        function(*args)
    else:
        run_world(world_size, function, *args)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_sums_and_statistics_are_those_without(name: str, world_size: int) -> None:
    _in_world(world_size, _exactly_as_without, [name])


@pytest.mark.long
def test_gradients_sums_and_statistics_are_those_without_on_three_ranks() -> None:
    run_world(3, _exactly_as_without, list(EXACT))


def test_three_ranks_are_no_exception() -> None:
    names = list(EXACT)[:5]
    run_world(3, _exactly_as_without, names, ("residual and ReLU", "whitening"))


# Where the recomputation may round otherwise, only the truth tells what is right.


class _Jitter:
    """The identity in a forward; on one rank, off by a rounding error in its recomputations."""

    def __init__(self, step: _Step) -> None:
        self.factors = itertools.chain([1.0], itertools.repeat(1 + 2.0**-23))
        self.moves = step.rank == 0 and step.checkpoints

    def __call__(self, x: Tensor) -> Tensor:
        return x * (next(self.factors) if self.moves else 1.0)


def _recomputed_with_a_rounding_error_on_one_rank(step: _Step) -> None:
    first, second = _Jitter(step), _Jitter(step)

    def region(x: Tensor) -> Tensor:
        return step.norm(second(step.norm(first(x.sin())).cos())).sin()

    step.run(region, step.draw(0)).square().sum().backward()


class _Listener(TorchDispatchMode):
    """Hears of every operation, and changes none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "listener": _Listener,
    "FLOP counter": _flop_counter,
}


def _within_modes(forward: str, backward: str, step: _Step) -> None:
    def inner(x: Tensor) -> Tensor:
        return step.norm(x.sin()).cos()

    def region(x: Tensor) -> Tensor:
        return step.norm(step.run(inner, step.norm(x.sin()))).exp()

    with MODES[forward]():
        out = step.run(region, step.draw(0))
    with MODES[backward]():
        out.square().sum().backward()


def _mode_within_the_region(step: _Step) -> None:
    def region(x: Tensor) -> Tensor:
        with _Listener():
            y = step.norm(x.sin())
        return step.norm(y.cos()).exp()

    step.run(region, step.draw(0)).square().sum().backward()


def _as_the_truth(scenarios: dict[str, Scenario], kinds: tuple[str, ...] = KINDS) -> None:
    for (name, scenario), kind in itertools.product(scenarios.items(), kinds):
        truth = _Outcome(scenario, kind, checkpoints=False, dtype=torch.float64)
        plain = _Outcome(scenario, kind, checkpoints=False)
        for early_stop in (True, False):
            with set_checkpoint_early_stop(early_stop):
                ours = _Outcome(scenario, kind, checkpoints=True)
            where = f"{name}, {kind}, early stop {early_stop}:"
            assert ours.sent == plain.sent, f"{where} sums of {ours.sent}, {plain.sent} without"
            _assert_as_exact(ours, truth, plain, where)


def _assert_as_exact(ours: _Outcome, truth: _Outcome, plain: _Outcome, where: str) -> None:
    for mine, exact, rounded in zip(ours.state, truth.state, plain.state, strict=True):
        if mine.is_floating_point():
            assert_as_exact(mine, exact, rounded, f"{where} statistics")
        else:
            assert mine == exact, f"{where} {mine} batches, {exact} without"
    for number, gradients in enumerate(
        zip(ours.gradients, truth.gradients, plain.gradients, strict=True)
    ):
        mine, exact, rounded = gradients
        assert mine is not None
        assert exact is not None
        assert rounded is not None
        # Where all values are moved alike by a rounding error, the errors of a sum add up.
        terms = ROWS * LENGTH * max(1.0, exact.abs().max().item())
        assert_as_exact(mine, exact, rounded, f"{where} gradient {number}", terms)


def _modes_in_every_combination() -> dict[str, Scenario]:
    return {
        "mode within the region": _mode_within_the_region,
        **{
            f"{forward} forward, {backward} backward": partial(_within_modes, forward, backward)
            for forward, backward in itertools.product(MODES, MODES)
        },
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rounding_error_of_one_ranks_recomputation_sends_nothing(world_size: int) -> None:
    scenarios = {"jitter": _recomputed_with_a_rounding_error_on_one_rank}
    _in_world(world_size, _as_the_truth, scenarios)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_dispatch_modes_around_either_pass_change_nothing(world_size: int) -> None:
    _in_world(world_size, _as_the_truth, _modes_in_every_combination())


# Selective checkpointing hands out stored results by counting an operation's calls, so that a
# recomputation which left out one of the layer's operations would shift all later ones.


class _EverySecondOperation:
    """A policy that saves every second operation, counted apart in forward and recomputation."""

    def __init__(self, offset: int) -> None:
        self.counts = {False: itertools.count(offset), True: itertools.count(offset)}

    def __call__(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if function._schema.is_mutable:  # torch refuses to hand out what was changed in place
            return CheckpointPolicy.PREFER_RECOMPUTE
        if next(self.counts[context.is_recompute]) % 2:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _policies() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "even operations", partial(_EverySecondOperation, 1)
    yield "odd operations", partial(_EverySecondOperation, 0)
    for name in ("bmm", "sum", "add", "mul", "baddbmm", "cat", "rsqrt", "_to_copy", "where"):
        packet = getattr(aten, name)
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        yield f"all aten.{name}", partial(list, overloads)


def _selectively(make_policy: Callable[[], Any], step: _Step) -> None:
    def region(x: Tensor, w: Tensor) -> Tensor:
        y = step.norm(torch.bmm(x.sin(), w))
        y = y * y.sum(2, keepdim=True) + (y + x).square()
        y = step.norm(torch.cat([y, x])[: len(x)])
        y = torch.baddbmm(y, torch.bmm(y, w), w)
        return (y + y.sum(0)).sin() * y.square().mean((0, 2), keepdim=True).add(1).rsqrt()

    x = step.draw(0)
    w = torch.linspace(-1, 1, 25, dtype=step.dtype).reshape(1, 5, 5).expand(len(x), 5, 5)
    contexts = partial(create_selective_checkpoint_contexts, make_policy())
    out = step.run(region, x, w, context_fn=contexts)
    out.square().sum().backward()


def _selective() -> None:
    _as_the_truth({name: partial(_selectively, policy) for name, policy in _policies()})


@pytest.mark.parametrize("world_size", [1, 2])
def test_selective_checkpointing_hands_out_the_results_of_the_right_operations(
    world_size: int,
) -> None:
    _in_world(world_size, _selective)


# The rest.


def _function_in_a_region(step: _Step) -> None:
    weight = step.draw(9)[0, :, 0].detach().requires_grad_()

    def region(x: Tensor) -> Tensor:
        y, _ = syncbn.sync_batch_norm(x.sin(), weight)
        z, moments = syncbn.sync_batch_norm(y.cos(), relu=True)
        return (z * moments.mean[:, None].to(z.dtype)).exp()

    step.run(region, step.draw(0)).square().sum().backward()


def _functions() -> None:
    for early_stop in (True, False):
        plain = _Outcome(_function_in_a_region, KINDS[0], checkpoints=False)
        with set_checkpoint_early_stop(early_stop):
            ours = _Outcome(_function_in_a_region, KINDS[0], checkpoints=True)
        _assert_equal(ours.gradients, plain.gradients, f"early stop {early_stop}: gradient")


@pytest.mark.parametrize("world_size", [1, 2])
def test_function_has_the_gradients_of_one_without_checkpointing(world_size: int) -> None:
    _in_world(world_size, _functions)


def _call(function: Norm, x: Tensor, use_reentrant: bool) -> Tensor:
    return function(x)


def _reentrant() -> None:
    for kind in KINDS[:-1:2]:
        outcomes: list[list[Tensor | None]] = []
        for reentrant in (False, True):
            step = _Step(kind, False, torch.float32)
            x = step.draw(0)
            with recorded_all_reduces() as sent:
                region: Any = checkpoint if reentrant else _call
                out = region(step.norm, x, use_reentrant=True)
                out.square().sum().backward()
            world_size = dist.get_world_size() if dist.is_initialized() else 1
            assert len(sent) == (0 if world_size == 1 else 3 if reentrant else 2)
            assert step.norm.state_dict()["layer.num_batches_tracked"] == 1 + reentrant
            outcomes.append(step.gradients())
        plain, ours = outcomes
        _assert_equal(ours, plain, f"{kind}: gradient")


@pytest.mark.parametrize("world_size", [1, 2])
def test_reentrant_checkpointing_sums_and_tracks_again_as_torchs_layer_does(
    world_size: int,
) -> None:
    _in_world(world_size, _reentrant)


def _in_another_mode_at_the_recomputation(kind: str, step: _Step, training: bool) -> Any:
    step.norm = _Block(kind).train(training)
    out = step.run(lambda x: step.norm(x.sin()).exp(), step.draw(0))
    step.norm.train(not training)
    return out.square().sum()


def _switched() -> None:
    for kind in KINDS[:-1]:
        loss = _in_another_mode_at_the_recomputation(kind, _Step(kind, True, torch.float32), False)
        with recorded_all_reduces() as sent, pytest.raises(SyncBNError, match=r"(?s)eval|train"):
            loss.backward()
        assert not sent, kind
        loss = _in_another_mode_at_the_recomputation(kind, _Step(kind, True, torch.float32), True)
        # Torch itself finds that the evaluation saves other tensors; or we may say it first.
        with (
            recorded_all_reduces() as sent,
            pytest.raises((SyncBNError, torch_checkpoint.CheckpointError)),
        ):
            loss.backward()
        assert not sent, kind


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_call_that_recomputes_none_raises_on_every_rank(world_size: int) -> None:
    _in_world(world_size, _switched)


def _called_once_more() -> None:
    for kind in ("affine", "not affine", "whitening"):
        step = _Step(kind, True, torch.float32)
        calls = iter([1, 2])

        def region(x: Tensor, step: _Step = step, calls: Iterator[int] = calls) -> Tensor:
            y = x.exp()
            with torch.no_grad():  # saves nothing, by which torch would notice
                for _ in range(next(calls)):
                    step.norm(x)
            return y.sin()

        loss = step.run(region, step.draw(0)).sum()
        with recorded_all_reduces() as sent, pytest.raises(SyncBNError, match="checkpoint"):
            loss.backward()
        assert not sent, kind


@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputation_with_more_calls_than_the_forward_raises_on_every_rank(
    world_size: int,
) -> None:
    _in_world(world_size, _called_once_more)


def _tensors_after_many_steps() -> None:
    step = _Step("affine", True, torch.float32)
    counts: list[int] = []
    for turn in range(4):
        for _ in range(3):
            x = step.draw(turn)
            step.run(lambda x: step.norm(step.norm(x.sin()).cos()).exp(), x).sum().backward()
            step.run(lambda x: step.norm(x.sin()), x)  # without a backward
            step.inputs.clear()
            del x
        gc.collect()
        # By type(), for isinstance() asks each object for its class.
        counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3], counts


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_region_remembers_goes_with_its_graph(world_size: int) -> None:
    _in_world(world_size, _tensors_after_many_steps)


def _closure(function: Any) -> dict[str, Any]:
    function = inspect.unwrap(function)
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def test_private_names_of_torch_that_tell_a_recomputation_are_there() -> None:
    module: Any = torch_checkpoint
    private: Any = torch._C._autograd  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- what this test is about
    hooks: list[list[Any]] = []

    def stack() -> list[Any]:
        found: list[Any] = []
        while (top := private._top_saved_tensors_default_hooks(True)) is not None:
            found.append(top)
            private._pop_saved_tensors_default_hooks()
        for pair in reversed(found):
            private._push_saved_tensors_default_hooks(*pair)
        return found

    def region(x: Tensor) -> Tensor:
        with save_on_cpu():
            hooks.append(stack())
            hooks.append(stack())  # the first left it as it was
        return x.sin().cos()

    x = torch.ones(1, requires_grad=True)
    checkpoint(region, x, use_reentrant=False).sum().backward()  # pyright: ignore[reportOptionalMemberAccess] -- torch 2.11 types the result as perhaps None
    forward, again, recomputation, _ = hooks
    assert forward == again
    names = [inspect.unwrap(pair[0]).__qualname__.split(".")[0] for pair in forward]
    assert names == ["save_on_cpu", module._checkpoint_hook.__name__]
    names = [inspect.unwrap(pair[0]).__qualname__.split(".")[0] for pair in recomputation]
    assert names == ["save_on_cpu", module._recomputation_hook.__name__]
    frame = _closure(forward[1][0])["frame"]
    found = _closure(recomputation[1][0])
    assert found["target_frame_ref"]() is frame
    assert isinstance(found["gid"], int)
    assert frame.recomp_counter[found["gid"]] == len(frame.weak_holders) == 2
    assert stack() == []
