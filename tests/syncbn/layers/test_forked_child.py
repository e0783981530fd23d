"""A child that a rank forks, such as a worker of a DataLoader, is no rank."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.errors import InputError, ReplicaError
from tests.support.world import run_world

CHANNELS = 4
LIMIT_S = 20
LAYERS: dict[str, Callable[[], Any]] = {
    "SyncBatchNorm": lambda: syncbn.SyncBatchNorm(CHANNELS),
    "through the process group": lambda: syncbn.SyncBatchNorm(CHANNELS, reducer="process_group"),
    "SyncWhitening": lambda: syncbn.SyncWhitening(CHANNELS, group_size=2),
}


def _input(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(6, CHANNELS, generator=generator)


def _in_a_forked_child(function: Callable[[], object]) -> str:
    """Call the function in a fork of this process; return what it raised, or ''."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, for a process with threads
        child = os.fork()
    if child == 0:
        said = ""
        try:
            function()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        finally:
            os.write(writable, said.encode())
            os._exit(0)  # without the ends that are the parent's
    os.close(writable)
    deadline = time.monotonic() + LIMIT_S
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(readable, "rb") as pipe:
        said = pipe.read().decode()
    return said if ended else f"the child hung; {said}"


def _forked(name: str, used_before: bool, children: int) -> None:
    """Train and evaluate in children of some ranks, between the steps of all ranks."""
    layer, twin = LAYERS[name](), LAYERS[name]()
    if used_before:
        for each in (layer, twin):
            each(_input(0))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    if dist.get_rank() < children:
        # Far from the parents' values, which it would spoil if it took part.
        said = _in_a_forked_child(lambda: layer(1000 + _input(1)))
        kinds = InputError.__name__, ReplicaError.__name__
        assert said.startswith(tuple(f"{kind}:" for kind in kinds)), said or "nothing was raised"
        assert "fork" in said.partition("\n")[0]
        # What needs no other rank is a child's to do.
        assert _in_a_forked_child(lambda: layer.eval()(_input(1))) == ""
    dist.barrier()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    for step in (2, 3):
        xs = [_input(step).requires_grad_() for _ in range(2)]
        for each, x in zip((layer, twin), xs, strict=True):
            each(x).pow(3).sum().backward()
        assert xs[0].grad is not None
        assert xs[1].grad is not None
        assert torch.equal(xs[0].grad, xs[1].grad)
    for key, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "used_before", "children"),
    [
        ("SyncBatchNorm", True, 1),
        ("SyncBatchNorm", True, 2),
        ("SyncBatchNorm", False, 1),
        ("SyncBatchNorm", False, 2),
        ("through the process group", True, 1),
        ("SyncWhitening", True, 2),
    ],
)
def test_training_in_a_forked_child_is_refused_and_leaves_the_ranks_alone(
    name: str, used_before: bool, children: int
) -> None:
    run_world(2, _forked, name, used_before, children)


def _alone() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    layer(_input(0))
    # A replica alone tells nobody anything, so that its child may train a copy.
    assert _in_a_forked_child(lambda: layer(_input(1))) == ""
    assert layer.num_batches_tracked == 1


def test_child_of_a_replica_alone_may_train() -> None:
    run_world(1, _alone)
