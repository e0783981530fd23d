"""Tensors that are sharded over a mesh are refused by name, on every rank, and nothing hangs.

nn.BatchNorm2d takes them from torch 2.14 on, if its parameters are DTensors too, by gathering the
whole batch on every rank, which is what a synchronized layer is there to avoid; before, torch has
no rule for it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import syncbn
from syncbn.errors import InputError, SyncBNError
from tests.support.world import run_world

CHANNELS = 4
ADVICE = r"(?s)DTensor.*to_local\(\)"
LAYERS: dict[str, Callable[[], Any]] = {
    "SyncBatchNorm": lambda: syncbn.SyncBatchNorm(CHANNELS),
    "with a ReLU": lambda: syncbn.SyncBatchNorm(CHANNELS, relu=True),
    "not affine": lambda: syncbn.SyncBatchNorm(CHANNELS, affine=False),
    "without statistics": lambda: syncbn.SyncBatchNorm(CHANNELS, track_running_stats=False),
    "converted": lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS)),
    "SyncWhitening": lambda: syncbn.SyncWhitening(CHANNELS, group_size=2),
}


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3 * dist.get_world_size(), CHANNELS, 2, 2, generator=generator)


def _sharded(mesh: DeviceMesh, placement: Placement | None = None) -> DTensor:
    return distribute_tensor(_batch(), mesh, [placement or Shard(0)])


def _own() -> Tensor:
    return _batch().chunk(dist.get_world_size())[dist.get_rank()]


def _refused_inputs() -> None:
    mesh = _mesh()
    for name, make in LAYERS.items():
        for training in (True, False):
            layer = make().train(training)
            before = {key: value.clone() for key, value in layer.state_dict().items()}
            for placement in (Shard(0), Replicate(), Shard(1)):
                with pytest.raises(InputError, match=ADVICE):
                    layer(_sharded(mesh, placement))
            for key, value in layer.state_dict().items():
                assert torch.equal(value, before[key]), (name, key)
            assert type(layer(_own())) is Tensor  # all ranks are together still


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_input_is_refused_by_name(world_size: int) -> None:
    run_world(world_size, _refused_inputs)


def _refused_parameters() -> None:
    mesh = _mesh()
    for name in ("SyncBatchNorm", "converted", "SyncWhitening"):
        for training in (True, False):
            layer = distribute_module(LAYERS[name](), mesh).train(training)
            for x in (_own(), _sharded(mesh)):
                with pytest.raises(InputError, match=ADVICE):
                    layer(x)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_parameters_are_refused_by_name(world_size: int) -> None:
    run_world(world_size, _refused_parameters)


def _refused_elsewhere() -> None:
    mesh, x = _mesh(), _own()
    vector = distribute_tensor(torch.ones(CHANNELS), mesh, [Replicate()])
    calls: list[Callable[[], Any]] = [
        lambda: syncbn.sync_batch_norm(_sharded(mesh)),
        lambda: syncbn.sync_batch_norm(x, vector),
        lambda: syncbn.sync_batch_norm(x, None, vector),
        lambda: syncbn.sync_batch_norm(x, residual=_sharded(mesh)),
        lambda: syncbn.SyncBatchNorm(CHANNELS)(x, _sharded(mesh)),
        lambda: syncbn.SyncBatchNorm(CHANNELS).eval()(x, _sharded(mesh)),
    ]
    for call in calls:
        with pytest.raises(InputError, match=ADVICE):
            call()
    syncbn.sync_batch_norm(x)


def test_sharded_arguments_of_the_function_and_residuals_are_refused_by_name() -> None:
    run_world(2, _refused_elsewhere)


def _sharded_on_one_rank() -> str:
    mesh, x = _mesh(), _own()
    layer = syncbn.SyncBatchNorm(CHANNELS)
    if dist.get_rank() == 0:
        x = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
    with pytest.raises(SyncBNError, match="DTensor") as caught:
        layer(x)
    return type(caught.value).__name__


def test_input_that_is_sharded_on_one_rank_alone_is_an_error_on_all() -> None:
    assert run_world(2, _sharded_on_one_rank) == ["InputError", "ReplicaError"]


def _as_advised() -> None:
    mesh = _mesh()
    ours, truth = syncbn.SyncBatchNorm(CHANNELS).double(), nn.BatchNorm2d(CHANNELS).double()
    whole = _batch().double().requires_grad_()
    x: Any = distribute_tensor(whole.detach(), mesh, [Shard(0)]).requires_grad_()
    y = DTensor.from_local(ours(x.to_local()), mesh, [Shard(0)])
    expected = truth(whole)
    y.to_local().pow(3).sum().backward()
    expected.pow(3).sum().backward()
    gradient: Any = x.grad
    assert gradient.placements == (Shard(0),)
    torch.testing.assert_close(y.full_tensor(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient.full_tensor(), whole.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), truth.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_advised_gives_the_results_of_one_process(world_size: int) -> None:
    run_world(world_size, _as_advised)
