"""The short way of plain CPU tensors: where it differs from the general one, and where it ends."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import _native
from syncbn.errors import InputError
from syncbn.kernels.native import source
from syncbn.moments import add_fingerprint, to_summable
from tests.support.tolerance import assert_as_exact
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 5
FUSED = {"plain": (False, False), "ReLU": (False, True), "residual and ReLU": (True, True)}

fused = pytest.mark.parametrize(("residual", "relu"), FUSED.values(), ids=FUSED)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), norm(4), nn.Tanh(), nn.Linear(4, 2), norm(2))


@pytest.mark.parametrize("world_size", [2, 3, 4096, 10_000])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_sent_is_what_the_reference_sends(world_size: int, rank: int) -> None:
    x, shift = _random(0, 4, CHANNELS, 3), _random(1, CHANNELS).double()
    library = _native.library
    assert library is not None
    vector = torch.empty(2 * CHANNELS + 1, dtype=torch.float64)
    where = rank, world_size, vector.data_ptr()
    library.syncbn_summable_moments(*source(x), shift.data_ptr(), *where)
    moments = syncbn.sync_batch_norm(x)[1]
    expected = add_fingerprint(to_summable(moments, shift), shift, rank, world_size)
    assert vector[0] == expected[0]
    torch.testing.assert_close(vector, expected, rtol=1e-14, atol=1e-14)


def _trained(kernels: str) -> list[Tensor]:
    os.environ["SYNCBN_KERNELS"] = kernels
    layer = syncbn.SyncBatchNorm(CHANNELS)
    for step in range(3):
        layer(_random(10 * step + dist.get_rank(), 4, CHANNELS, 3) + 100)
    return list(layer.state_dict().values())


def _trained_with_native_kernels_on_one_rank() -> list[Tensor]:
    return _trained("native" if dist.get_rank() == 0 else "reference")


def test_ranks_with_different_kernels_understand_each_other() -> None:
    mixed = run_world(2, _trained_with_native_kernels_on_one_rank)
    reference = run_world(2, _trained, "reference")
    # The sums are those of both; what each rank makes of them is rounded in its own way.
    for mine, other, expected in zip(*mixed, reference[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=0)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)


def _penalised(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (y.sin().sum() + gradient.square().sum()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradient_can_be_differentiated_again() -> None:
    x = _random(1, 64, 3)
    ours, plain = _network(syncbn.SyncBatchNorm), _network(nn.BatchNorm1d)
    truth = _penalised(_network(nn.BatchNorm1d).double(), x.double())
    for mine, exact, rounded in zip(_penalised(ours, x), truth, _penalised(plain, x), strict=True):
        assert_as_exact(mine, exact, rounded, "gradient of the penalty")


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


def test_running_statistics_count_as_changed() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    assert layer.running_mean is not None
    before = layer.running_mean._version
    layer(_random(0, 4, CHANNELS))
    assert layer.running_mean._version > before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_of_another_dtype_are_tracked(dtype: torch.dtype) -> None:
    layer, truth = syncbn.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS).double()
    for buffer in (layer.running_mean, layer.running_var):
        assert buffer is not None
        buffer.data = buffer.data.to(dtype)
    x = _random(0, 6, CHANNELS)
    layer(x)
    truth(x.double())
    for name in ("running_mean", "running_var"):
        mine, exact = getattr(layer, name), getattr(truth, name)
        assert mine.dtype == dtype
        assert_as_exact(mine, exact, exact.to(dtype), name)


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
    assert _kept(lambda: ours(x)) <= _kept(lambda: theirs(x))
    # With β, which the mask is computed from.
    assert _kept(lambda: fused(x)) <= _kept(lambda: theirs(x).relu()) - size + 4 * CHANNELS
    assert _kept(lambda: fused(x, other)) <= _kept(lambda: (theirs(x) + other).relu())


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


def test_function_refuses_a_residual_unlike_its_input() -> None:
    x = _random(0, 4, CHANNELS)
    with pytest.raises(InputError, match=r"residual like the input, of shape \(4, 5\), torch.floa"):
        syncbn.sync_batch_norm(x, residual=x[:1])


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


def _chosen() -> None:
    x = _random(dist.get_rank(), 4, CHANNELS)
    os.environ["SYNCBN_REDUCER"] = "shared_memory"
    by_choice = syncbn.SyncBatchNorm(CHANNELS, reducer="process_group")
    with recorded_all_reduces() as sent:
        y = by_choice(x)
    assert len(sent) == 1
    torch.testing.assert_close(y, syncbn.sync_batch_norm(x, reducer="process_group")[0])
    os.environ["SYNCBN_REDUCER"] = "no such thing"
    torch.testing.assert_close(by_choice(x), y)
    with pytest.raises(InputError, match="is 'no such thing'; set it to"):
        syncbn.sync_batch_norm(x)


def test_argument_chooses_the_reducer_over_the_variable() -> None:
    run_world(2, _chosen)


def test_reducer_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="the reducer is 'nccl'; choose auto, shared_memory, "):
        syncbn.SyncBatchNorm(CHANNELS, reducer="nccl")


def test_choices_are_shown() -> None:
    shown = repr(syncbn.SyncBatchNorm(CHANNELS, relu=True, reducer="process_group"))
    assert shown.endswith("relu=True, reducer='process_group')")
    assert "relu" not in repr(syncbn.SyncBatchNorm(CHANNELS))
