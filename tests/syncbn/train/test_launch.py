import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncbn.bundle import read_bundle
from syncbn.train.run_directory import RunDirectory
from tests.support.processes import TORCHRUN, TRAIN, run

SHORT = ["epochs=1", "model.width=4", "track=none", "launch.device=cpu"]
EXTERNAL = [*TORCHRUN, "--nproc-per-node=2", TRAIN[1]]
FORMS = pytest.mark.parametrize("command", [TRAIN, EXTERNAL], ids=["launcher", "torchrun"])


def _the_run(directory: Path) -> RunDirectory:
    (path,) = (directory / "runs").iterdir()
    return RunDirectory(path)


@FORMS
def test_both_forms_leave_one_whole_run_directory(command: list[str], tmp_path: Path) -> None:
    overrides = ["epochs=2", "model.width=4", "launch.device=cpu"]
    result = run([*command, *overrides], tmp_path)
    assert result.returncode == 0, result.stdout
    finished = _the_run(tmp_path)
    assert {file.name for file in finished.path.iterdir()} == {
        ".lock",
        "bundle",
        "checkpoint.pt",
        "config.yaml",
        "metrics.jsonl",
        "run.log",
        "wandb",
    }
    config = finished.read_config()
    assert (config.launch.nproc, config.model.name, config.epochs) == (2, "cnn", 2)
    lines = [json.loads(line) for line in finished.metrics_file.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert read_bundle(finished.bundle_dir).manifest.metrics == lines[-1]
    log = finished.log_file.read_text()
    assert log.count("epoch  1/2") == 1
    assert "2 ranks on cpu" in log
    # On a pipe, lines instead of a progress bar, and each of them once.
    assert "\r" not in result.stdout
    assert result.stdout.count("epoch  1/2") == 1


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (TRAIN, "optim.lrr=1", "syncbn-train: unknown key 'optim.lrr'; did you mean 'lr'?"),
        (TRAIN, "optim.lr=fast", "syncbn-train: optim.lr: Value 'fast' of type 'str'"),
        (TRAIN, "norm=batch", "Could not find 'norm/batch'"),
        (TRAIN, "+more=1", "unknown key 'more'"),
        (EXTERNAL, "optim.lrr=1", "syncbn-train: unknown key 'optim.lrr'; did you mean 'lr'?"),
    ],
)
def test_wrong_configuration_is_explained_once_and_starts_nothing(
    command: list[str], override: str, message: str, tmp_path: Path
) -> None:
    result = run([*command, override], tmp_path)
    assert result.returncode != 0
    assert result.stdout.count(message) == 1
    assert "epoch" not in result.stdout.replace("epochs", "")
    assert list(tmp_path.iterdir()) == []
    if command is TRAIN:
        assert result.returncode == 2
        assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "seed=0,1"], "-m is not available under torchrun"),
        (["launch.nproc=3"], "launch.nproc=3, but torchrun started 2 ranks here"),
    ],
)
def test_what_contradicts_torchrun_is_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run([*EXTERNAL, *arguments], tmp_path)
    assert result.returncode != 0
    assert result.stdout.count(message) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_gpus_are_explained(tmp_path: Path) -> None:
    result = run([*TRAIN, "launch.device=cuda"], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert result.stdout.count("launch.device=cuda needs 2 GPUs, found 0; use") == 1


def test_batch_larger_than_the_data_is_explained(tmp_path: Path) -> None:
    result = run([*TRAIN, *SHORT, "data.batch_size=1000"], tmp_path)
    assert result.returncode == 1
    assert "data.batch_size=1000 on 2 replicas needs 2000 samples a step" in result.stdout
    assert "data.batch_size=1000" in _the_run(tmp_path).log_file.read_text()


def test_sweep_trains_each_configuration_in_a_directory_of_its_own(tmp_path: Path) -> None:
    sweep = [*TRAIN, "-m", *SHORT, "norm=sync,local", "max_steps=2"]
    result = run(sweep, tmp_path)
    assert result.returncode == 0, result.stdout
    runs = [RunDirectory(path) for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert {run.read_config().norm.name for run in runs} == {"sync", "local"}
    assert all(run.bundle_dir.exists() for run in runs)


def test_help_names_the_groups_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run([*TRAIN, "--help"], tmp_path)
    assert result.returncode == 0
    for text in ("syncbn-train norm=local", "norm: local, none, sync", "optim: adamw, sgd", "lr:"):
        assert text in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_module_is_the_same_command_as_the_script(tmp_path: Path) -> None:
    result = run([sys.executable, "-m", "syncbn.train", "optim.lrr=1"], tmp_path)
    assert result.returncode == 2
    assert "unknown key 'optim.lrr'" in result.stdout


def _processes_naming(text: str) -> list[int]:
    found: list[int] = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text in (directory / "cmdline").read_text():
                found.append(int(directory.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def _stop_after_an_epoch(overrides: list[str], run_dir: Path, number: signal.Signals) -> None:
    """Start a job, send its launcher a signal after the first epoch, and see all of it end."""
    launcher = subprocess.Popen([*TRAIN, *overrides], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    os.kill(launcher.pid, number)
    assert launcher.wait(60) == 128 + number
    while _processes_naming(str(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (run_dir / "bundle").exists()


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")


@NEEDS_PROC
def test_stopping_the_launcher_stops_the_ranks_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    overrides = [*SHORT[1:], "epochs=4", f"run_dir={run_dir}"]
    _stop_after_an_epoch(overrides, run_dir, signal.SIGTERM)
    result = run([*TRAIN, *overrides], tmp_path)
    assert result.returncode == 0, result.stdout
    assert "resuming after epoch" in result.stdout
    epochs = [int(line["epoch"]) for line in RunDirectory(run_dir).read_metrics()]
    assert epochs == list(range(1, 5))


@NEEDS_PROC
def test_closing_the_terminal_stops_the_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "closed"
    overrides = [*SHORT[1:], "epochs=50", f"run_dir={run_dir}"]
    _stop_after_an_epoch(overrides, run_dir, signal.SIGHUP)
