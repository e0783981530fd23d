"""Moments gathered from all ranks, as on GPUs: here by the interpreted Triton kernels."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.comm import exchange
from syncbn.comm.exchange import Exchange
from syncbn.errors import InputError, ReplicaError
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments, from_rows
from tests.support.interpreted import tiles_of
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 4


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (syncbn.SyncBatchNorm(CHANNELS) for _ in range(2))


def _batch(seed: int = 0, channels: int = CHANNELS) -> Tensor:
    generator = torch.Generator().manual_seed(7 * seed + dist.get_rank())
    return torch.randn(6, channels, 2, generator=generator) + seed


def _swapped() -> tuple[str, Tensor]:
    net = _Net()
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        net.second(_batch(1))
        net.first(_batch())
        with pytest.raises(ReplicaError) as caught:
            (net.second if dist.get_rank() else net.first)(_batch())
        # What a GPU would go on with: nobody looks there.
        with mock.patch.object(exchange, "is_valid", return_value=True):
            y = (net.second if dist.get_rank() else net.first)(_batch())
        return str(caught.value), y.isnan().all()


def test_layers_in_another_order_are_named_or_give_nan() -> None:
    for message, is_nan in run_world(2, _swapped):
        assert "rank 0 is at the forward of 'first' (4 channels, float32)" in message
        assert "rank 1 is at the forward of 'second'" in message
        assert is_nan


def _reloaded_on_one_rank() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        layer(_batch(1))
        shift = layer._memory.shift  # pyright: ignore[reportPrivateUsage] -- what stamps its rows
        if dist.get_rank() == 0:
            shift.zero_()  # as that of a layer made anew, which has seen nothing
        with recorded_all_reduces() as sums:
            y = layer(_batch(2))
        assert not sums
        assert y.isfinite().all()
        everyone = [torch.empty_like(shift) for _ in range(2)]
        dist.all_gather(everyone, shift)
        assert torch.equal(*everyone)
        if dist.get_rank() == 0:
            shift.add_(1)  # another one's
        torch.testing.assert_close(layer(_batch(2)), y)


def test_a_layer_made_anew_on_one_rank_goes_along() -> None:
    run_world(2, _reloaded_on_one_rank)


def _of_other_dtypes() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    x = _batch(3)
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        # The kernels take neither of these, and on the other rank they take all.
        for mine in (x.double(), x[:0], x.transpose(0, 2).contiguous().transpose(0, 2)):
            layer(mine if dist.get_rank() else x)
    for buffer in layer.buffers():
        everyone = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(everyone, buffer)
        assert torch.equal(*everyone)


def test_running_statistics_are_bit_identical_whatever_ranks_compute_with() -> None:
    run_world(2, _of_other_dtypes)


def _refused_on_one_rank() -> str:
    net = _Net()
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        if dist.get_rank() == 0:
            with pytest.raises(ReplicaError) as error:
                net.first(_batch())
            return str(error.value)
        with pytest.raises(InputError) as refused:
            net.first(_batch(channels=5))
        return str(refused.value)


def test_an_input_refused_on_one_rank_ends_the_call_on_all() -> None:
    other, own = run_world(2, _refused_on_one_rank)
    assert own in other


def _single_value() -> str:
    with mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"), tiles_of(64):
        rows = 1 if dist.get_rank() == 0 else 0
        with pytest.raises(InputError) as caught:
            syncbn.SyncBatchNorm(CHANNELS)(torch.ones(rows, CHANNELS))
        return str(caught.value)


def test_one_value_in_all_is_refused_on_every_rank() -> None:
    assert all("got 1, whose variance is undefined" in text for text in run_world(2, _single_value))


class _Group:
    """A reducer of so many ranks, of which all send the same row."""

    group = None
    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        return self.world_size * vector

    def gather(self, vector: Tensor) -> Tensor:
        return vector.expand(self.world_size, -1)


@pytest.mark.parametrize(
    ("world_size", "gathers"), [(1, False), (2, True), (32, True), (33, False)]
)
def test_up_to_32_ranks_gather_off_the_cpu(world_size: int, gathers: bool) -> None:
    alone = Exchange(_Group(world_size), None, CHANNELS, torch.float32)
    assert alone.gathers(torch.device("meta")) == gathers
    assert not alone.gathers(torch.device("cpu"))


def test_exchange_off_the_cpu_looks_at_no_value() -> None:
    def row(shift: Tensor | None, mark: object) -> Tensor:
        return ReferenceKernels().row(torch.ones(6, CHANNELS, device="meta"), shift)

    def merge(rows: Tensor, shift: Tensor | None, mark: object) -> Moments:
        return from_rows(rows, shift)

    layer = syncbn.SyncBatchNorm(CHANNELS, device="meta")
    memory = layer._memory  # pyright: ignore[reportPrivateUsage] -- as above
    gathering = Exchange(_Group(2), memory, CHANNELS, torch.float32)
    moments = gathering.gather(row, merge, torch.device("meta"))
    assert moments.packed.shape == (2 * CHANNELS + 1,)
