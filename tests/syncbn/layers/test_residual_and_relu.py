"""What `SyncBatchNorm` does in the same pass: adding a residual, and a ReLU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 5
FUSED = {"plain": (False, False), "ReLU": (False, True), "residual and ReLU": (True, True)}

fused = pytest.mark.parametrize(("residual", "relu"), FUSED.values(), ids=FUSED)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@fused
def test_gradient_of_many_upstream_gradients_at_once(residual: bool, relu: bool) -> None:
    x, other = _random(0, 4, CHANNELS, 3).requires_grad_(), _random(1, 4, CHANNELS, 3)
    layer = syncbn.SyncBatchNorm(CHANNELS, relu=relu)
    y = layer(x, other if residual else None)
    dys = _random(2, 3, *x.shape)
    together = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    alone = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    torch.testing.assert_close(together, alone)


def _checkpointed(residual: bool, relu: bool) -> None:
    def block(layer: syncbn.SyncBatchNorm, x: Tensor) -> Tensor:
        return layer(x.sin(), x if residual else None).square()

    results: list[tuple[Tensor | None, int, str]] = []
    for run in (lambda *of: block(*of), lambda *of: checkpoint(block, *of, use_reentrant=False)):
        layer = syncbn.SyncBatchNorm(CHANNELS, relu=relu)
        x = _random(dist.get_rank(), 4, CHANNELS, 3).requires_grad_()
        with recorded_all_reduces() as sent:
            # Two micro-batches at once, the first of them backward last.
            losses = [run(layer, x * factor).sum() for factor in (1.0, 2.0)]
            for loss in reversed(losses):
                loss.backward()
        results.append((x.grad, len(sent), str(layer.state_dict())))
    (gradient, count, state), (again, count_again, state_again) = results
    assert gradient is not None
    assert again is not None
    assert torch.equal(gradient, again)
    assert count == count_again == (4 if dist.get_world_size() > 1 else 0)
    assert state == state_again


@fused
@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpointing_tracks_once_and_sends_nothing_again(
    world_size: int, residual: bool, relu: bool
) -> None:
    run_world(world_size, _checkpointed, residual, relu)


def _kept(work: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward keeps for its backward, each tensor once."""
    kept: dict[tuple[int, torch.Size], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_no_more_than_torchs_layer_and_one_activation_less_with_a_relu(
    dtype: torch.dtype,
) -> None:
    x = _random(0, 4, CHANNELS, 6, 6).to(dtype).requires_grad_()
    other = _random(1, 4, CHANNELS, 6, 6).to(dtype).requires_grad_()
    size = x.numel() * x.element_size()
    theirs, ours = nn.BatchNorm2d(CHANNELS), syncbn.SyncBatchNorm(CHANNELS)
    fused = syncbn.SyncBatchNorm(CHANNELS, relu=True)
    count = 8  # of the whole batch, which torch's layer reads off the shape of its own
    assert _kept(lambda: ours(x)) <= _kept(lambda: theirs(x)) + count
    # With β, which the mask is computed from.
    with_relu = _kept(lambda: theirs(x).relu()) + count
    assert _kept(lambda: fused(x)) <= with_relu - size + 4 * CHANNELS
    assert _kept(lambda: fused(x, other)) <= _kept(lambda: (theirs(x) + other).relu()) + count


class _Elsewhere(Tensor):
    """A subclass, which the library must not look into."""


@pytest.mark.parametrize("kind", ["a subclass", "another dtype", "broadcast"])
def test_other_residuals_are_added_as_torch_adds_them(kind: str) -> None:
    x, other = _random(0, 4, CHANNELS, 3).requires_grad_(), _random(1, 4, CHANNELS, 3)
    if kind == "a subclass":
        other = other.as_subclass(_Elsewhere)
    elif kind == "broadcast":
        other = other[:1]
    else:
        other = other.double()
    layer, plain = syncbn.SyncBatchNorm(CHANNELS, relu=True), syncbn.SyncBatchNorm(CHANNELS)
    for training in (True, False):
        y = layer.train(training)(x, other)
        expected = (plain.train(training)(x) + other).relu()
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y.as_subclass(Tensor), expected.as_subclass(Tensor))


@fused
def test_evaluation_is_that_of_separate_layers(residual: bool, relu: bool) -> None:
    x, other = _random(0, 4, CHANNELS, 3), _random(1, 4, CHANNELS, 3)
    layer, truth = syncbn.SyncBatchNorm(CHANNELS, relu=relu), nn.BatchNorm1d(CHANNELS)
    for each in (layer, truth):
        each(x)
        each.eval()
    y = truth(x) + other if residual else truth(x)
    torch.testing.assert_close(layer(x, other if residual else None), y.relu() if relu else y)


@fused
def test_compiles_without_a_break(residual: bool, relu: bool) -> None:
    results: list[list[Tensor]] = []
    wrappers: list[Callable[[Any], Any]] = [
        lambda layer: layer,
        lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager"),
    ]
    for wrap in wrappers:
        torch.compiler.reset()
        layer = syncbn.SyncBatchNorm(CHANNELS, relu=relu)
        x, other = (_random(seed, 4, CHANNELS, 3).requires_grad_() for seed in range(2))
        y = wrap(layer)(x, other if residual else None)
        y.backward(_random(2, 4, CHANNELS, 3))
        assert layer.running_var is not None
        results.append([y.detach(), layer.running_var])
        results[-1] += [t.grad for t in (x, other, *layer.parameters()) if t.grad is not None]
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
