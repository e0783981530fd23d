"""Converted layers on several ranks. Without timm, which takes each rank seconds to load."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.support.world import run_world


class Scaled(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def _scaled() -> None:
    layer, whole = Scaled(3).double(), nn.BatchNorm1d(3).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    syncbn.convert_sync_batchnorm(layer)
    y, expected = layer(x.chunk(2)[dist.get_rank()]), 3 * whole(x)
    torch.testing.assert_close(y, expected.chunk(2)[dist.get_rank()])
    torch.testing.assert_close(layer.running_var, whole.running_var)
    assert type(syncbn.revert_sync_batchnorm(layer)) is Scaled


def test_subclass_of_torchs_synchronized_layer_gets_our_forward() -> None:
    run_world(2, _scaled)


def _wrapped() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.BatchNorm2d(4)).double()
    wrapped = DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
    expected = whole(x)
    y = wrapped(x.chunk(2)[dist.get_rank()])
    torch.testing.assert_close(y, expected.chunk(2)[dist.get_rank()])
    (y.pow(3).sum() * 2).backward()  # of which DDP takes the mean over the ranks
    expected.pow(3).sum().backward()
    for mine, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(dict(model.named_buffers()), dict(whole.named_buffers()))
    syncbn.revert_sync_batchnorm(wrapped)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.SyncBatchNorm, nn.BatchNorm2d]


def test_converted_layers_train_as_one_process_in_ddp_on_the_cpu() -> None:
    run_world(2, _wrapped)
