"""Runs that an earlier version wrote, committed as it left them."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from syncbn.bundle import read_bundle
from syncbn.train.run.command import main
from syncbn.train.run.directory import RunDirectory
from tests.support.jobs import Job

RUNS = Path(__file__).parents[2] / "support" / "runs_of_0_1"


class _Resumed(Job):
    small = ()


def test_run_that_was_killed_goes_on_to_the_end_that_it_would_have_had(tmp_path: Path) -> None:
    shutil.copytree(RUNS / "stopped", tmp_path / "run")  # in the second of three epochs
    job = _Resumed(tmp_path / "run")
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    ours, theirs = (
        safetensors.torch.load_file(run.bundle_dir / "model.safetensors")
        for run in (job.run, RunDirectory(RUNS / "finished"))
    )
    for name, value in theirs.items():
        # Bit-identical on the machine that wrote it; others round otherwise.
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    lines, before = job.run.read_metrics(), RunDirectory(RUNS / "finished").read_metrics()
    assert [line["step"] for line in lines] == [12, 24, 36]
    assert lines[2]["train_loss"] == pytest.approx(before[2]["train_loss"], rel=1e-3)
    result = job.run.read_result()
    assert result is not None
    assert result.metrics["test_loss"] == pytest.approx(before[2]["ema_test_loss"], rel=1e-3)


def test_finished_run_is_read_served_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(RUNS / "finished")
    result = run.read_result()
    assert result is not None
    # What a sweep minimized then: the averaged model's error on the test data.
    assert (result.status, result.objective) == ("finished", 1 - 0.6875)
    assert run.read_config().optim.decay_all
    assert read_bundle(run.bundle_dir).manifest.task == "classification"
    monkeypatch.setattr("sys.argv", ["syncbn-runs", str(RUNS)])
    main()
    table = capsys.readouterr().out
    assert "best_test_accuracy" in table
    assert "81.25 %" in table
