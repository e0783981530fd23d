from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from syncbn.errors import TrainingError
from syncbn.train.checkpoint import (
    Checkpoint,
    read_checkpoint,
    share_checkpoint,
    write_checkpoint,
)
from tests.support.world import run_world

CHECKPOINT = Checkpoint(
    epoch=2,
    step=88,
    metrics={"test_accuracy": 0.5},
    model={"weight": torch.arange(3.0)},
    optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    schedule={"last_epoch": 88},
)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    for _ in range(2):  # the second write replaces the first
        write_checkpoint(tmp_path / "checkpoint.pt", CHECKPOINT)
    read = read_checkpoint(tmp_path / "checkpoint.pt")
    assert (read.epoch, read.step, read.metrics) == (2, 88, {"test_accuracy": 0.5})
    assert torch.equal(read.model["weight"], torch.arange(3.0))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def _share(file: Path) -> tuple[int, float] | str | None:
    try:
        shared = share_checkpoint(file if dist.get_rank() == 0 else None)
    except TrainingError as error:
        return str(error)
    return None if shared is None else (shared.step, shared.model["weight"].sum().item())


def test_all_ranks_get_the_checkpoint_of_rank_0(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    assert run_world(2, _share, file) == [None, None]
    write_checkpoint(file, CHECKPOINT)
    assert run_world(2, _share, file) == [(88, 3.0), (88, 3.0)]


def test_damaged_checkpoint_raises_on_all_ranks(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"\x80\x04damaged")
    with pytest.raises(TrainingError, match="cannot resume from"):
        read_checkpoint(file)
    for message in run_world(2, _share, file):
        assert isinstance(message, str)
        assert message.startswith(f"cannot resume from {file}")
