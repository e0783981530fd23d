import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_loader import ConfigLoader
from torch import nn

from syncbn.train.launch.composed import composing_once
from syncbn.train.launch.sweep import job_name
from syncbn.train.run.directory import RunDirectory
from tests.support.processes import REPOSITORY, TRAIN, run

TINY = ["max_steps=2", "track=none", "launch.device=cpu", "launch.nproc=1"]
HERE = "tests.syncbn.train.launch.test_sweep"


def make(in_channels: int, num_classes: int, fails: str) -> nn.Module:
    """Return a model, or fail in one of the ways in which a job can."""
    match fails:
        case "sys_exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            pass
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


@pytest.mark.long
def test_jobs_that_fail_are_recorded_with_their_own_error_and_the_others_finish(
    tmp_path: Path,
) -> None:
    sweep = [*TRAIN, "-m", *TINY, "norm=none", "model=custom", f"model.factory={HERE}:make"]
    sweep += ["sweep_dir=sweep"]
    kinds = "+model.arguments.fails=no,sys_exit,kill"
    result = run([*sweep, kinds, "seed=1"], tmp_path, 300, PYTHONPATH=str(REPOSITORY))
    assert result.returncode == 1
    said = {path.name: _result(path) for path in (tmp_path / "sweep").glob("*fails*")}
    assert len(said) == 3
    for kind, reason in {
        "no": "None",
        "sys_exit": "rank 0 ended with exit code 3",
        "kill": "rank 0 was killed by SIGKILL",
    }.items():
        status, error = said[f"+model.arguments.fails={kind}"]
        assert status == ("finished" if kind == "no" else "failed")
        assert error == reason
    assert "1 of 3 jobs finished, in sweep" in result.stdout
    assert "\nsyncbn-train: rank 0 was killed by SIGKILL\n" in result.stdout
    # What has finished is not trained again.
    again = [*sweep, kinds.replace("sys_exit,kill", "kill"), "seed=1"]
    result = run(again, tmp_path, 300, PYTHONPATH=str(REPOSITORY))
    assert result.stdout.count(": starting") == 1
    assert "+model.arguments.fails=no: finished" in result.stdout


def _result(path: Path) -> tuple[str, str]:
    result = RunDirectory(path).read_result()
    assert result is not None
    return result.status, str(result.error)


@pytest.mark.long
def test_job_that_cannot_be_configured_fails_alone(tmp_path: Path) -> None:
    sweep = [*TRAIN, "-m", *TINY, "model.width=2", "optim.lr=-1,0.1"]
    result = run(sweep, tmp_path)
    assert result.returncode == 1
    assert "optim.lr=-1: failed: optim.lr=-1.0: input should be greater than 0" in result.stdout
    assert "1 of 2 jobs finished" in result.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    assert RunDirectory(directory / "optim.lr=0.1").bundle_dir.exists()
    assert directory.name.split("-")[-2] == "sweep"


def test_jobs_that_cannot_be_composed_fail_alone(tmp_path: Path) -> None:
    sweep = [*TRAIN, "-m", *TINY, "model.width=2", "sweep_dir=sweep", "optim.momentum=0.8"]
    sweep += ["hydra.sweeper.max_batch_size=1"]
    result = run([*sweep, "norm=synch,local", "optim=adamw,sgd"], tmp_path)
    assert result.returncode == 1
    assert "1 of 4 jobs finished" in result.stdout
    assert result.stdout.count(": starting") == 1
    for job, why in {
        "norm=synch,optim=adamw": "norm=synch: did you mean sync? choose one of",
        "norm=synch,optim=sgd": "norm=synch: did you mean sync? choose one of",
        # One choice has a key that the other has not.
        "norm=local,optim=adamw": "unknown key 'optim.momentum'; ",
    }.items():
        assert result.stdout.count(f"  {job}: failed: {why}") == 1
        refused = RunDirectory(tmp_path / "sweep" / job).read_result()
        assert refused is not None
        assert (refused.reason, refused.exit_code, refused.attempt) == ("config", 1, 1)
    assert RunDirectory(tmp_path / "sweep" / "norm=local,optim=sgd").bundle_dir.exists()


@pytest.mark.long
def test_sweep_that_has_finished_is_extended(tmp_path: Path) -> None:
    sweep = [*TRAIN, "-m", "sweep_dir=sweep", "seed=1,2"]
    assert run([*sweep, *TINY, "model.width=2"], tmp_path).returncode == 0
    config = RunDirectory(tmp_path / "sweep" / "seed=1").config_file
    result = run([*sweep, *TINY, "model.width=3", "max_steps=3"], tmp_path)
    assert result.returncode == 0  # both have finished, if not with what was typed
    assert result.stdout.count("cannot go on with model.width=3 (was 2)") == 2
    result = run([*sweep, "max_steps=4"], tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(": starting") == 2
    assert "width: 2" in config.read_text()
    for seed in (1, 2):
        assert RunDirectory(tmp_path / "sweep" / f"seed={seed}").read_metrics()[-1]["step"] == 4
    assert run([*sweep, "max_steps=4"], tmp_path).stdout.count(": starting") == 0


@pytest.mark.parametrize(
    ("override", "message", "place"),
    [
        ("optim.lrr=1,2", "unknown key 'optim.lrr'; did you mean 'lr'?", []),
        ("norm=synch,batch", "norm=synch: did you mean sync? choose one of local, none", []),
        ("norm=synch,batch", "norm=synch: did you mean sync?", ["sweep_dir=sweep"]),
    ],
)
def test_wrong_sweep_is_refused_before_any_job(
    tmp_path: Path, override: str, message: str, place: list[str]
) -> None:
    result = run([*TRAIN, "-m", *TINY, override, *place], tmp_path)
    assert (result.returncode, result.stdout.count(message)) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_hydra_composes_a_job_once_to_check_it_and_to_launch_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def compose(loader: object, master_config: object, sweep_overrides: list[str]) -> object:
        asked.append(tuple(sweep_overrides))
        return object()

    (loader,) = ConfigLoader.__subclasses__()  # which a sweep has loaded before it begins
    monkeypatch.setattr(loader, "load_sweep_config", compose)
    with composing_once():
        load: Any = loader.load_sweep_config
        checked = [load(None, {}, ["seed=1"]), load(None, {}, ["seed=2"])]
        assert [load(None, {}, ["seed=1"]), load(None, {}, ["seed=2"])] == checked
        assert asked == [("seed=1",), ("seed=2",)]
        assert load(None, {}, ["seed=1"]) not in checked  # launchers write into what they get
    assert loader.load_sweep_config is compose


def test_names_of_jobs_tell_them_apart_and_fit_into_a_directory() -> None:
    names = [
        job_name(overrides)
        for overrides in (
            [],
            ["norm=sync", "seed=1"],
            ["data.path=/a/b"],
            ["data.path=/a_b"],
            ["model.arguments={a:1}"],
            ["x=" + "1" * 300],
            ["x=" + "1" * 301],
        )
    ]
    assert names[:2] == ["defaults", "norm=sync,seed=1"]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 200 for name in names)
