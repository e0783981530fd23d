"""The exchange through peers' memory: its kernels interpreted, ranks being processes with files."""

import importlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.comm import reducer as choice
from syncbn.comm import symmetric_memory
from syncbn.comm.reducer import SymmetricMemoryReducer, select_reducer
from syncbn.errors import InputError
from tests.support.interpreted import mailboxes_in, tiles_of
from tests.support.peers import exchange, poll_less, share
from tests.support.world import run_world

# Of one call after the other: none, less and more than a block of a program, and other memory.
SIZES = [0, 1, 7, 100, 300, 1000]


def _reducer() -> SymmetricMemoryReducer:
    group = dist.group.WORLD
    assert group is not None
    return SymmetricMemoryReducer(group)


def _calls(directory: Path) -> None:
    reducer = _reducer()
    with mailboxes_in(directory):
        for call in range(12):
            exchange(reducer, call, SIZES[call % len(SIZES)], torch.device("cpu"))
    assert len(reducer._mailboxes) == 2  # pyright: ignore[reportPrivateUsage] -- one for each power of two


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_every_vector_in_call_after_call(world_size: int, tmp_path: Path) -> None:
    run_world(world_size, _calls, tmp_path)


def _stays_away(directory: Path) -> list[bool]:
    reducer, rank = _reducer(), dist.get_rank()
    with mailboxes_in(directory):
        exchange(reducer, 0, 5, torch.device("cpu"))
        poll_less(reducer, 100)
        if rank == 1:
            dist.barrier()  # until rank 0 has given up
        came: list[bool] = []
        for call in (1, 2, 3):
            everyone = [share(number, call, 5) for number in range(2)]
            rows = reducer.gather(everyone[rank])
            assert torch.equal(rows[rank], everyone[rank])
            came.append(torch.equal(rows[1 - rank], everyone[1 - rank]))
            assert came[-1] or rows[1 - rank].isnan().all()
        assert reducer.sum(everyone[rank]).isnan().all()
        if rank == 0:
            dist.barrier()
        return came


def test_a_rank_that_stays_away_is_nan_from_then_on_and_what_is_late_is_right(
    tmp_path: Path,
) -> None:
    # Rank 0 sent its vector before it gave rank 1 up, and nothing thereafter.
    assert run_world(2, _stays_away, tmp_path) == [[False] * 3, [True, False, False]]


def _sends_another_number(directory: Path) -> None:
    reducer, rank = _reducer(), dist.get_rank()
    with mailboxes_in(directory):
        exchange(reducer, 0, 5, torch.device("cpu"))
        rows = reducer.gather(torch.ones(5 + rank, dtype=torch.float64))
        assert rows[rank].eq(1).all()
        assert rows[1 - rank].isnan().all()
        exchange(reducer, 1, 5, torch.device("cpu"))


def test_another_number_of_values_is_nan_for_that_call(tmp_path: Path) -> None:
    run_world(2, _sends_another_number, tmp_path)


def _goes_over_the_group() -> None:
    reducer = _reducer()
    with mock.patch.object(symmetric_memory.Mailboxes, "gather") as gather:
        for vector in (torch.ones(2, dtype=torch.float32), torch.ones(2**16 + 1).double()):
            assert torch.equal(reducer.sum(vector), 2 * vector)
            assert torch.equal(reducer.gather(vector), vector.expand(2, -1))
        assert not gather.called


def test_other_dtypes_and_long_vectors_go_over_the_process_group() -> None:
    run_world(2, _goes_over_the_group)


def _step(wish: str) -> list[Tensor]:
    layer = syncbn.SyncBatchNorm(6, reducer=wish)
    x = torch.randn(5 + dist.get_rank(), 6, 3, generator=torch.Generator().manual_seed(1))
    x = (x + 10 * dist.get_rank()).requires_grad_()
    results: list[Tensor] = []
    for _ in range(3):
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        results += [y.detach(), *gradients]
    return [*results, *layer.buffers()]


def _as_a_layer(directory: Path) -> None:
    reducer = _reducer()
    with mock.patch.dict(os.environ, SYNCBN_KERNELS="triton"), tiles_of(64):
        expected = _step("process_group")
        selected = mock.patch.object(choice, "_symmetric", return_value=reducer)
        with mailboxes_in(directory), selected:
            results = _step("symmetric_memory")
    assert reducer._mailboxes  # pyright: ignore[reportPrivateUsage] -- it was this way
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def test_a_layer_computes_what_it_does_over_the_process_group(tmp_path: Path) -> None:
    run_world(2, _as_a_layer, tmp_path)


def _no_memory(words: int, device: torch.device) -> Tensor:
    if dist.get_rank() == 1:
        raise RuntimeError("none is left")
    return torch.zeros(words, dtype=torch.int64)


def _memory_of_its_own(memory: Tensor, group: dist.ProcessGroup) -> tuple[list[int], object]:
    everyone = [torch.zeros_like(memory) for _ in range(dist.get_world_size(group))]
    return [theirs.data_ptr() for theirs in everyone], everyone


# What goes wrong, by what is in place of what, and what each rank says.
IMPOSSIBLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "two hosts": ({"host": lambda: 1 + dist.get_rank()}, ("are not of one host",) * 2),
    "unknown host": ({"host": lambda: dist.get_rank()}, ("are not of one host",) * 2),
    "no memory on one rank": ({"allocate": _no_memory}, (r"\(see rank 1\)", r"\(none is left\)")),
    "memory that does not reach": (
        {"rendezvous": _memory_of_its_own, "_TRIAL_S": 1e-4},
        ("the last did not arrive as it was sent",) * 2,
    ),
    "no GPU": (
        {"allocate": symmetric_memory.allocate},
        ("cannot be had .* connected by NVLink",) * 2,
    ),
}


def _impossible(directory: Path) -> None:
    reducer, vector = _reducer(), torch.ones(2, dtype=torch.float64)
    with mailboxes_in(directory):
        for changes, messages in IMPOSSIBLE.values():
            with (
                mock.patch.multiple(symmetric_memory, **changes),
                pytest.raises(InputError, match=messages[dist.get_rank()]),
            ):
                reducer.sum(vector)
        exchange(reducer, 0, 5, torch.device("cpu"))  # nothing is left of the attempts


def test_what_is_impossible_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    run_world(2, _impossible, tmp_path)


class _Stream:
    """A CUDA stream, or what is captured of it."""

    def __init__(self, captured: bool = False) -> None:
        self.captured = captured
        self.waited: list[_Stream] = []

    def wait_stream(self, other: "_Stream") -> None:
        self.waited.append(other)


def _on_streams() -> None:
    reducer, one, two, graph, fork = (
        _reducer(),
        _Stream(),
        _Stream(),
        _Stream(True),
        _Stream(True),
    )
    vector = mock.Mock(device=torch.device("cuda", 0))
    vector.numel.return_value = 5
    with (
        mock.patch.object(symmetric_memory, "_captured", lambda stream: stream.captured),
        mock.patch.object(torch.cuda, "current_stream") as current,
    ):
        for current.return_value in (one, one, two, graph, fork, one):
            reducer._follow(vector.device)  # pyright: ignore[reportPrivateUsage] -- no GPU is here
        current.return_value = graph
        with pytest.raises(InputError, match=r"of 5 values.*; run the model once before"):
            reducer._open(vector)  # pyright: ignore[reportPrivateUsage] -- as above
    waited = [stream.waited for stream in (one, two, graph, fork)]
    assert waited == [[], [one], [], [graph]]


def test_calls_on_several_streams_follow_each_other_and_a_capture_opens_no_memory() -> None:
    run_world(2, _on_streams)


def _chosen() -> None:
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers a backend
    fake = dist.new_group([0, 1], backend="fake")
    assert isinstance(fake, dist.ProcessGroup)
    cuda = torch.device("cuda", 0)
    for group, device, message in (
        (None, None, "the vectors are on cpu; it is for GPUs alone"),
        (None, torch.device("meta"), "the vectors are on meta"),
        (fake, cuda, "it takes nccl or gloo for GPUs, choose 'auto' or"),
    ):
        with pytest.raises(InputError, match=message):
            select_reducer(group, device, "symmetric_memory")
    assert isinstance(select_reducer(None, cuda, "symmetric_memory"), SymmetricMemoryReducer)
    assert not isinstance(select_reducer(None, cuda), SymmetricMemoryReducer)
    with mock.patch.dict(os.environ, SYNCBN_REDUCER="symmetric_memory"):
        assert isinstance(select_reducer(None, cuda), SymmetricMemoryReducer)


def test_it_is_chosen_for_gpus_alone_and_by_nobody_who_did_not_ask() -> None:
    run_world(2, _chosen)
