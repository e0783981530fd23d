"""What every synchronized layer has: here, its choice of a reducer."""

import os

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.errors import InputError
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 5


def _chosen() -> None:
    x = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(dist.get_rank()))
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
