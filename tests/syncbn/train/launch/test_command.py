import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import syncbn
from syncbn.bundle import read_bundle
from syncbn.train.config import compose_config
from syncbn.train.launch import command as module
from syncbn.train.run.directory import Result, RunDirectory, open_run
from syncbn.train.schema import CnnConfig
from tests.support.jobs import SMALL, Job, children, is_alive, under_torchrun, wait_until
from tests.support.processes import TORCHRUN, TRAIN, run

EXTERNAL = [*TORCHRUN, "--nproc-per-node=2", TRAIN[1]]
FORMS = pytest.mark.parametrize(
    "command",
    # The README's commands, which a test runs, train under torchrun too.
    [
        pytest.param(TRAIN, id="launcher"),
        pytest.param(EXTERNAL, id="torchrun", marks=pytest.mark.long),
    ],
)


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
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "result.json",
        "run.log",
        "status.json",
        "steps.jsonl",
        "tracker_id",
        "wandb",
        *([".started_by"] if command is EXTERNAL else []),
    }
    config = finished.read_config()
    assert (config.launch.nproc, config.model.name, config.epochs) == (2, "cnn", 2)
    lines = [json.loads(line) for line in finished.metrics_file.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert [line for line in lines if line["best"]][-1] == best
    ended = finished.read_result()
    assert ended is not None
    assert read_bundle(finished.bundle_dir).manifest.metrics == ended.metrics
    assert ended.metrics["test_accuracy"] > 0.2
    log = finished.log_file.read_text()
    assert log.count("epoch 1/2") == 1
    assert "2 ranks on cpu" in log
    # On a pipe, lines instead of a progress bar, and each of them once.
    assert "\r" not in result.stdout
    assert result.stdout.count("epoch 1/2") == 1
    assert result.stdout.count("status       finished after 2 epochs") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "syncbn-train: unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("optim.lr=fast", "syncbn-train: optim.lr: Value 'fast' of type 'str'"),
        ("norm=synch", "norm=synch: did you mean sync? choose one of local, none, penalty"),
        ("lr=0.1", "unknown key 'lr'; did you mean 'optim.lr'? valid: name, seed"),
        ("+more=1", "unknown key 'more'"),
    ],
)
def test_wrong_configuration_is_explained_once_and_starts_nothing(
    override: str, message: str, tmp_path: Path
) -> None:
    result = run([*TRAIN, override], tmp_path)
    assert result.returncode == 2
    assert result.stdout.count(message) == 1
    assert "epoch" not in result.stdout.replace("epochs", "")
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in result.stdout


REFUSED = [
    (["optim.lrr=1"], "syncbn-train: unknown key 'optim.lrr'; did you mean 'lr'?"),
    (["-m", "seed=0,1"], "type `syncbn-train -m seed=0,1`, which starts the ranks itself"),
    (["launch.nproc=3"], "launch.nproc=3, but torchrun started 2 ranks here"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_ranks_of_torchrun_refuse_what_is_wrong_or_contradicts_it(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (cwd := tmp_path / "cwd").mkdir()
    codes, output = under_torchrun(arguments, cwd)
    assert codes == [2, 2], output
    assert output.count(message) == 1
    assert "epoch" not in output.replace("epochs", "")
    assert list(cwd.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_torchrun_itself_ends_where_its_ranks_refuse(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run([*EXTERNAL, *arguments], tmp_path)
    assert result.returncode != 0
    assert result.stdout.count(message) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_directory_alone_goes_on_under_torchrun(tmp_path: Path) -> None:
    (cwd := tmp_path / "cwd").mkdir()
    typed = [*SMALL, "run_dir=run", "max_steps=2", "model.width=3", "schedule=constant"]
    codes, output = under_torchrun(typed, cwd)
    assert codes == [0, 0], output
    codes, output = under_torchrun(["run_dir=run"], cwd)
    assert codes == [2, 2], output
    assert output.count("holds a finished run; choose another directory, or say what to add") == 1
    codes, output = under_torchrun(["run_dir=run", "model.width=4", "max_steps=4"], cwd)
    assert codes == [2, 2], output
    assert output.count("cannot go on with model.width=4 (was 3): that would be another mod") == 1
    codes, output = under_torchrun(["run_dir=run", "max_steps=4"], cwd)
    assert codes == [0, 0], output
    assert output.count("going on with max_steps=4 (was 2)") == 1
    run = RunDirectory(cwd / "run")
    assert run.read_metrics()[-1]["step"] == 4
    config = run.read_config()
    assert (config.model, config.schedule.name) == (CnnConfig(width=3), "constant")


def test_missing_gpus_are_explained(tmp_path: Path) -> None:
    found = torch.cuda.device_count()
    needed = found + 2
    job = Job(tmp_path / "run", "launch.device=cuda", f"launch.nproc={needed}")
    assert job.wait() == 2
    said = f"launch.device=cuda needs {needed} GPUs, found {found}; use"
    assert Path(f"{job.run.path}.out").read_text().count(said) == 1


@pytest.mark.long
def test_launcher_ends_with_the_code_of_ranks_that_miss_their_gpus(tmp_path: Path) -> None:
    result = run([*TRAIN, "launch.device=cuda"], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stdout.count("launch.device=cuda needs 2 GPUs, found 0; use") == 1


def test_help_names_the_groups_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run([*TRAIN, "--help"], tmp_path)
    assert result.returncode == 0
    for text in (
        "syncbn-train norm=local",
        "norm: local, none, penalty",
        "optim: adamw, sgd",
        "lr:",
    ):
        assert text in result.stdout
    assert "schema" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_version_is_that_of_syncbn(tmp_path: Path) -> None:
    result = run([*TRAIN, "--version"], tmp_path)
    assert (result.returncode, result.stdout) == (0, f"syncbn-train {syncbn.__version__}\n")


def test_module_is_the_same_command_as_the_script(tmp_path: Path) -> None:
    result = run([sys.executable, "-m", "syncbn.train", "optim.lrr=1"], tmp_path)
    assert result.returncode == 2
    assert "unknown key 'optim.lrr'" in result.stdout


def _start(overrides: list[str], run_dir: Path) -> "subprocess.Popen[bytes]":
    """Start a job and return its launcher once it has made some steps."""
    command = [*TRAIN, *overrides, f"run_dir={run_dir}", "log_every_steps=1"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "steps.jsonl").exists():
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    return launcher


def _ranks(launcher: "subprocess.Popen[bytes]") -> list[int]:
    (server,) = children(launcher.pid)
    (supervisor,) = children(server)
    return children(supervisor)


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")


@pytest.mark.long
@NEEDS_PROC
def test_stopping_the_launcher_stops_the_ranks_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    launcher = _start([*SMALL, "epochs=4"], run_dir)
    ranks = _ranks(launcher)
    assert len(ranks) == 2
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(60) == 128 + signal.SIGTERM
    assert not any(is_alive(rank) for rank in ranks)
    assert not (run_dir / "bundle").exists()
    job = Job(run_dir, "epochs=4", "log_every_steps=1")
    assert job.wait() == 0, Path(f"{run_dir}.out").read_text()
    assert "resuming in epoch" in job.run.log_file.read_text()
    assert [int(line["epoch"]) for line in job.run.read_metrics()] == [1, 2, 3, 4]
    again = [*TRAIN, *SMALL, "epochs=4", "log_every_steps=1", f"run_dir={run_dir}"]
    result = run(again, tmp_path)
    assert (result.returncode, result.stdout.count("holds a finished run; choose")) == (2, 1)


# The tests of resuming do the same to the supervisor, without starting a launcher.
@NEEDS_PROC
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_end_of_the_launcher_is_the_end_of_its_ranks(
    tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "ended"
    launcher = _start([*SMALL, "epochs=500"], run_dir)
    ranks = _ranks(launcher)
    os.kill(launcher.pid, number)
    code = launcher.wait(60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not any(is_alive(rank) for rank in ranks))
    assert len(list((run_dir / "checkpoints").iterdir())) >= 1


@NEEDS_PROC
@pytest.mark.long
def test_torchrun_starts_a_killed_rank_again_in_the_same_directory(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", TRAIN[1]]
    overrides = [*SMALL, "epochs=6", "log_every_steps=1", "checkpoint.every_steps=5"]
    with (tmp_path / "output").open("w") as output:
        torchrun = subprocess.Popen(
            [*command, *overrides], cwd=tmp_path, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/steps.jsonl")):
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    os.kill(children(torchrun.pid)[-1], signal.SIGKILL)
    assert torchrun.wait(120) == 0, (tmp_path / "output").read_text()
    finished = _the_run(tmp_path)
    assert [line["epoch"] for line in finished.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert finished.log_file.read_text().count("2 ranks on cpu") == 2


def _without_supervisor(
    monkeypatch: pytest.MonkeyPatch, wait: Callable[[Any, list[int], float], int]
) -> None:
    """Have launchers wait for nobody, in a way of the test."""
    job = SimpleNamespace(close=lambda: None)
    server = SimpleNamespace(launch=lambda run_dir, lock: job)
    monkeypatch.setattr(module, "_server", server)
    monkeypatch.setattr(module, "_wait", wait)


def test_run_that_finished_stays_so_if_a_signal_ends_its_last_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    finished = Result("finished", None, {"val_accuracy": 0.5}, 1, 0)

    def wait(job: Any, told: list[int], stop_timeout_s: float) -> int:
        run.write_result(finished)
        told.append(signal.SIGTERM)
        return 128 + signal.SIGTERM

    _without_supervisor(monkeypatch, wait)
    opened = open_run(compose_config([f"run_dir={run.path}"]))
    with opened, pytest.raises(SystemExit) as ended:
        module.launch(opened)
    assert ended.value.code == 128 + signal.SIGTERM
    result = run.read_result()
    assert result is not None
    assert (result.status, result.metrics) == ("finished", finished.metrics)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-9, ("failed", "killed", "what started the ranks was killed by SIGKILL", 1)),
        (3, ("failed", "rank_failed", "the supervisor ended with exit code 3 and left no word", 3)),
    ],
)
def test_launcher_says_how_a_job_ended_that_left_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: tuple[str, str, str, int]
) -> None:
    run = RunDirectory(tmp_path / "run")

    def wait(job: Any, told: list[int], stop_timeout_s: float) -> int:
        run.begin_attempt(1)
        run.append_metrics({"epoch": 1, "step": 5, "best": 1.0})
        return code

    _without_supervisor(monkeypatch, wait)
    for attempt in (1, 2):
        with open_run(compose_config([f"run_dir={run.path}"])) as opened:
            result = module.launch(opened)
        assert (result.status, result.reason, result.error, result.exit_code) == said
        assert (result.attempt, result.metrics["epoch"]) == (attempt, 1)
        assert result.started is not None
        assert result.ended is not None
        assert result.duration_s == result.ended - result.started
    assert [each.attempt for each in run.read_attempts()] == [1, 2]
