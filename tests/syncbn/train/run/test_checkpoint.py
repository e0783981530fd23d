import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.errors import TrainingError
from syncbn.train.run import checkpoint as module
from syncbn.train.run.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointWriter,
    Position,
    checkpoint_files,
    encode,
    name_best,
    read_checkpoint,
    read_newest,
)


def _checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    return Checkpoint(
        position=Position(epoch=2, samples=48, step=step),
        world_size=2,
        metrics={"test_accuracy": 0.5},
        best={},
        sums=[1.5, 2.0, 3.0],
        states={"model": {"weight": torch.full((3,), value)}, "optimizer": {"state": {0: 1.0}}},
        generators=[{"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}] * 2,
    )


def _write(directory: Path, *steps: int, keep: int = 2, best: int = -1) -> None:
    writer = CheckpointWriter(directory, keep)
    for step in steps:
        writer.write(_checkpoint(step, step), step == best)
    writer.wait()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    _write(tmp_path, 88)
    (file,) = checkpoint_files(tmp_path)
    read = read_checkpoint(file)
    assert read.position == Position(2, 48, 88)
    assert (read.world_size, read.metrics, read.sums) == (2, {"test_accuracy": 0.5}, [1.5, 2, 3])
    assert torch.equal(read.states["model"]["weight"], torch.full((3,), 88.0))
    assert read.generators[1]["python"] == (3, (1, 2), None)


def test_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    _write(tmp_path, 1, 2, 3, 10, best=1)
    assert [file.name for file in checkpoint_files(tmp_path)] == [
        "step-000000010.ckpt",
        "step-000000003.ckpt",
    ]
    assert read_checkpoint(tmp_path / BEST).position.step == 1
    assert {file.name for file in tmp_path.iterdir() if file.suffix != ".ckpt"} == set()


def _write_until_killed(
    monkeypatch: pytest.MonkeyPatch, file: Path, step: int, best: int = -1
) -> None:
    """Write, and be killed, as far as files show it, right before a file appears."""
    replace = Path.replace
    with monkeypatch.context() as patch:

        def die(self: Path, target: Path) -> Path:
            if target == file:
                patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
                raise RuntimeError("killed")
            return replace(self, target)

        patch.setattr(Path, "replace", die)
        with pytest.raises(RuntimeError, match="killed"):
            _write(file.parent, step, best=best)


def _kill_before_best(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(directory, 1, best=1)
    _write_until_killed(monkeypatch, directory / BEST, 2, best=2)
    names = {file.name for file in directory.iterdir()}
    assert names == {BEST, *(f"step-00000000{name}" for name in ("1.ckpt", "2.ckpt", "2.tmp"))}
    assert read_checkpoint(directory / BEST).position.step == 1


def test_best_checkpoint_gets_its_name_after_a_kill_before_it_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_before_best(tmp_path, monkeypatch)
    for _ in range(2):
        name_best(tmp_path, Position(step=2))
        assert read_checkpoint(tmp_path / BEST).position.step == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_second_name_that_a_kill_left_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_before_best(tmp_path, monkeypatch)
    # The state before a step that cannot be made.
    _write_until_killed(monkeypatch, tmp_path / "step-000000002.ckpt", 2)
    newest = read_newest(tmp_path)
    assert newest is not None
    assert newest.position.step == 2
    _write(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoint_is_the_best_if_it_ends_the_best_epoch() -> None:
    def at(samples: int, epoch: float, best: float) -> Checkpoint:
        return Checkpoint(Position(2, samples), 1, {"epoch": epoch}, {"epoch": best}, [], {}, [])

    assert at(0, 2, 2).is_best
    assert not at(0, 2, 1).is_best
    assert not at(8, 2, 2).is_best  # within the next epoch
    assert not Checkpoint(Position(), 1, {}, {}, [], {}, []).is_best


def test_state_may_change_while_it_is_written(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    checkpoint = Checkpoint(Position(), 1, {}, {}, [], {"model": {"weight": weight}}, [])
    release = threading.Event()
    writer = CheckpointWriter(tmp_path, 1)
    writer._thread.submit(release.wait)  # pyright: ignore[reportPrivateUsage] -- holds the writing up
    writer.write(checkpoint, is_best=False)
    weight.fill_(1)
    release.set()
    writer.wait()
    assert read_checkpoint(checkpoint_files(tmp_path)[0]).states["model"]["weight"].sum() == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damaged_file_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, 1, 2)
    newest = checkpoint_files(tmp_path)[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-1], "flip": content, "empty": b"", "other": b"syncbn"}
    newest.write_bytes(damaged[damage])
    with pytest.raises(TrainingError, match=f"{newest} is damaged"):
        read_checkpoint(newest)
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position.step == 1
    assert "trying the one before" in caplog.text


def test_no_checkpoint_is_none_and_none_intact_an_error(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "nowhere") is None
    assert read_newest(tmp_path) is None
    (tmp_path / "step-000000001.ckpt").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"no checkpoint is intact: .*to start from the begin"):
        read_newest(tmp_path)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    class _Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    file = tmp_path / "step-000000001.ckpt"
    evil: Any = _Evil()
    file.write_bytes(encode(Checkpoint(Position(), 1, {}, {}, [], {"model": evil}, [])))
    with pytest.raises(TrainingError, match="is not a checkpoint of this version"):
        read_checkpoint(file)
    assert not (tmp_path / "pwned").exists()


def test_failed_write_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 1)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    writer = CheckpointWriter(tmp_path, 2)
    writer.write(_checkpoint(2), is_best=True)
    said = r"cannot write a checkpoint to .*No space left on dev"
    with pytest.raises(TrainingError, match=said) as raised:
        writer.write(_checkpoint(3), is_best=False)
    assert raised.value.reason == "disk_full"
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000001.ckpt"]
