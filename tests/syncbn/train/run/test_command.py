import csv
import fcntl
import io
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from syncbn.train.run.command import main
from syncbn.train.run.comparison import differing_keys, find_runs, group_runs, metric_of
from syncbn.train.run.status import Status, write_status


def _make(
    path: Path,
    accuracies: Sequence[float] = (0.25, 0.75, 0.5),
    *,
    config: Mapping[str, Any] | None = None,
    status: str | None = "finished",
    error: str | None = None,
) -> Path:
    """Write the directory of a run."""
    path.mkdir(parents=True)
    values = {
        "name": "digits-cnn",
        "seed": 0,
        "epochs": 3,
        "run_dir": str(path),
        "data": {"name": "digits", "batch_size": 16},
        "model": {"name": "cnn", "arguments": {}, "shape": [1, 2]},
        "norm": {"name": "sync", "eps": 1e-5},
        "optim": {"name": "sgd", "lr": 0.1, "clip_norm": None},
    }
    for key, value in (config or {}).items():
        section, _, name = key.rpartition(".")
        parent: Any = values.setdefault(section, {}) if section else values
        parent[name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    metrics: list[dict[str, float]] = [
        {
            "epoch": epoch,
            "step": 90 * epoch,
            "train_loss": 1 / epoch,
            "test_loss": 2 / epoch,
            "test_accuracy": accuracy,
        }
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if status is not None:
        result = {"status": status, "error": error, "metrics": {}, "duration_s": 61.25}
        (path / "result.json").write_text(json.dumps(result))
    return path


def _peak(seed: int, batch_size: int) -> float:
    return 0.5 + 0.01 * seed**2 + 0.001 * batch_size


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two normalizations, two batch sizes and three seeds, of which one failed."""
    root = tmp_path / "runs" / "sweep"
    for norm in ("local", "sync"):
        for batch_size in (2, 16):
            for seed in (1, 2, 3):
                failed = (norm, batch_size, seed) == ("local", 2, 3)
                peak = _peak(seed, batch_size)
                _make(
                    root / f"{norm},{batch_size},{seed}",
                    (peak / 2, peak, peak - 0.125),
                    config={"norm.name": norm, "data.batch_size": batch_size, "seed": seed},
                    status="failed" if failed else "finished",
                    error="the training loss is nan" if failed else None,
                )
    return root


def _answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def _csv(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, str]]:
    text = _answer(capsys, *arguments, "--csv", "-")
    return list(csv.DictReader(io.StringIO(text)))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("syncbn-runs: ")
    return captured.err


def _painted(file: Path) -> float:
    """Return the variance of a picture's pixels, after checking that it is of a sensible size."""
    image: Any = imread(file)
    height, width, _ = image.shape
    assert 400 <= height <= 1500
    assert 800 <= width <= 2000
    return float(image[..., :3].var())


def test_runs_are_listed_with_the_keys_in_which_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path / "b")
    _make(tmp_path / "a", config={"norm.name": "local", "norm.eps": 1e-5, "seed": 4})
    _make(tmp_path / "sweep" / "c", [0.5], status="failed", error="out of\nmemory")
    lines = _answer(capsys, tmp_path).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "run status epochs_done best_test_accuracy last_train_loss duration_s seed norm.name",
        "a finished 3/3 75.00 % 0.3333 1 min 01 s 4 local",
        "b finished 3/3 75.00 % 0.3333 1 min 01 s 0 sync",
        "sweep/c failed 1/3 50.00 % 1 1 min 01 s 0 sync",
        "",
        "sweep/c: out of memory",
    ]


def test_default_path_is_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs is not a directory" in _refused(capsys)
    _make(tmp_path / "runs" / "one")
    assert [row["run"] for row in _csv(capsys)] == ["one"]


def test_runs_are_found_two_levels_down_and_once(tmp_path: Path) -> None:
    deep = _make(tmp_path / "a" / "b" / "c")
    run = _make(tmp_path / "a" / "run")
    _make(run / "bundle")  # what lies in a run is no run
    (tmp_path / "a" / "file").touch()
    assert [each.name for each in find_runs([tmp_path])] == ["run"]
    assert [each.name for each in find_runs([tmp_path / "a"])] == ["b/c", "run"]
    assert [each.name for each in find_runs([deep])] == ["c"]
    assert [each.name for each in find_runs([run, tmp_path, tmp_path / "a" / "run"])] == ["run"]


def test_jobs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("one/seed=1", "two/seed=1"):
        _make(tmp_path / name)
    found = find_runs([tmp_path / "one", tmp_path / "two"])
    assert [run.name for run in found] == ["one/seed=1", "two/seed=1"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "is not a directory"),
        ("empty", "holds no run"),
        ("one/config.yaml", "is not a directory"),
    ],
)
def test_wrong_paths_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    _make(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    said = _refused(capsys, tmp_path / "one", tmp_path / name)
    assert said.startswith(f"syncbn-runs: {tmp_path / name} {reason}; name a run")


def test_run_without_result_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    for name in ("no lock", "killed", "locked"):
        _make(tmp_path / name, status=None)
    (tmp_path / "killed" / ".lock").touch()
    with _locked(tmp_path / "locked"):
        found = {run.name: run.status for run in find_runs([tmp_path])}
    assert found == {"no lock": "unknown", "killed": "unknown", "locked": "running"}
    with (tmp_path / "killed" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking did not take it


def test_cut_last_line_is_passed_over(tmp_path: Path) -> None:
    run = _make(tmp_path / "run", status=None)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "test_acc')
    (found,) = find_runs([run])
    assert len(found.epochs) == 3
    assert found.damage == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b"a: ["),
        ("config.yaml", b"\xff"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"a: &a\n  b: *a\n"),
        ("result.json", b"{"),
        ("result.json", b'{"status": "done"}'),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo\n{"epoch": 3}\n'),
    ],
)
def test_damaged_run_is_listed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes
) -> None:
    _make(tmp_path / "good")
    (_make(tmp_path / "run") / file).write_bytes(content)
    main([str(tmp_path), "--csv", "-"])
    out, err = capsys.readouterr()
    statuses = {row["run"]: row["status"] for row in csv.DictReader(io.StringIO(out))}
    assert statuses == {"run": "damaged", "good": "finished"}
    assert err.startswith("syncbn-runs: warning: run is damaged: ")
    assert str(tmp_path / "run" / file) in err
    assert err.count("\n") == 1
    (group,) = _csv(capsys, tmp_path, "--by", "seed")
    assert group["n"] == "1"


def test_job_that_was_refused_is_listed_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path / "good")
    (_make(tmp_path / "run", status="failed", error="optim.lr=-1") / "config.yaml").unlink()
    _, row = _csv(capsys, tmp_path)
    assert (row["status"], row["error"]) == ("failed", "optim.lr=-1")
    refused, good = _csv(capsys, tmp_path, "--by", "optim.lr")
    assert (refused["optim.lr"], refused["n"], refused["failed"]) == ("", "0", "1")
    assert (good["optim.lr"], good["n"], good["failed"]) == ("0.1", "1", "0")


def test_differing_keys_leave_out_what_a_choice_implies(tmp_path: Path) -> None:
    _make(tmp_path / "a", config={"norm": {"name": "none"}, "model.arguments": {"depth": 3}})
    _make(tmp_path / "b", config={"optim.lr": 0.2, "seed": 3})
    _make(tmp_path / "c", config={"norm.name": "local", "model.shape": [1, 3]})
    keys = differing_keys(find_runs([tmp_path]))
    assert keys == ["seed", "model.arguments.depth", "model.shape", "norm.name", "optim.lr"]
    assert differing_keys(find_runs([tmp_path / "a"])) == []


def test_metric_is_that_of_the_best_or_the_last_epoch(tmp_path: Path) -> None:
    (run,) = find_runs([_make(tmp_path / "run", [0.25, 0.75, 0.5])])
    assert metric_of(run, "test_accuracy", "best") == 0.75
    assert metric_of(run, "test_loss", "best") == 1
    assert metric_of(run, "test_accuracy", "last") == 0.5
    assert math.isnan(metric_of(run, "nothing", "last"))
    (empty,) = find_runs([_make(tmp_path / "empty", [])])
    assert math.isnan(metric_of(empty, "test_accuracy", "best"))
    assert math.isnan(metric_of(empty, "test_accuracy", "last"))


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    with (directory / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("said", "status", "shown"),
    [
        (None, "starting", "starting"),
        (Status(1, 1.0, 2.0), "starting", "starting"),
        (
            Status(1, 1.0, 2.0, "training", 57, 120, time_left_s=67.2),
            "running",
            "running: step 57 of 120, 1 min 07 s left",
        ),
        (Status(1, 1.0, 2.0, "exporting", 120, 120), "running", "running: step 120 of 120, expor"),
    ],
)
def test_run_that_has_begun_says_how_far_it_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    said: Status | None,
    status: str,
    shown: str,
) -> None:
    run = _make(tmp_path / "run", [], status=None)
    if said is not None:
        write_status(run, said)
    with _locked(run):
        assert shown in _answer(capsys, run)
        assert [row["status"] for row in _csv(capsys, run)] == [status]
        assert _answer(capsys, run, "--status", status).count(shown) == 1
    assert "unknown" in _answer(capsys, run)


def test_list_as_csv_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    third = 1 / 3
    _make(tmp_path / "a,b", [0.1, third, 0.2], config={"optim.lr": 1e-5, "optim.nesterov": True})
    changed = {"optim.lr": 0.1 + 0.2, "optim.nesterov": False, "optim.clip_norm": 1.0}
    _make(tmp_path / "c", [], config=changed, status="failed", error="wrong,\nvery")
    first, second = _csv(capsys, tmp_path)
    assert first == {
        "run": "a,b",
        "status": "finished",
        "epochs_done": "3",
        "best_test_accuracy": repr(third),
        "last_train_loss": repr(third),
        "duration_s": "61.25",
        "reason": "",
        "error": "",
        "optim.lr": "1e-05",
        "optim.clip_norm": "",
        "optim.nesterov": "True",
    }
    assert float(second["optim.lr"]) == 0.1 + 0.2
    assert second["best_test_accuracy"] == second["last_train_loss"] == "nan"
    assert second["error"] == "wrong,\nvery"


def test_groups_have_mean_and_sample_deviation(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _csv(capsys, sweep, "--by", "norm.name", "data.batch_size")
    keys = [(row["norm.name"], row["data.batch_size"]) for row in rows]
    assert keys == [("local", "2"), ("local", "16"), ("sync", "2"), ("sync", "16")]
    for row, batch_size in zip(rows, (2, 16, 2, 16), strict=True):
        seeds = (1, 2) if row is rows[0] else (1, 2, 3)
        values = [_peak(seed, batch_size) for seed in seeds]
        assert int(row["n"]) == len(values)
        assert float(row["best_test_accuracy_mean"]) == statistics.mean(values)
        assert float(row["best_test_accuracy_stdev"]) == statistics.stdev(values)
        assert row["failed"] == ("1" if row is rows[0] else "0")


def test_groups_are_shown_in_percent(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _answer(capsys, sweep, "--by", "norm.name", "data.batch_size").splitlines() == [
        "norm.name  data.batch_size  n  best_test_accuracy_mean  failed",
        "local                    2  2           52.70 ± 2.12 %       1",
        "local                   16  3           56.27 ± 4.04 %       0",
        "sync                     2  3           54.87 ± 4.04 %       0",
        "sync                    16  3           56.27 ± 4.04 %       0",
    ]


def test_metric_and_epoch_of_groups_are_chosen(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _csv(capsys, sweep, "--by", "seed", "--metric", "test_loss", "--at", "last")
    assert [row["n"] for row in rows] == ["4", "4", "3"]
    assert {float(row["last_test_loss_mean"]) for row in rows} == {2 / 3}
    assert {float(row["last_test_loss_stdev"]) for row in rows} == {0}


def test_runs_of_another_status_count_when_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path / "one", [0.5])
    _make(tmp_path / "stopped", [0.25], status="interrupted")
    (group,) = _csv(capsys, tmp_path, "--by", "seed")
    assert (group["n"], group["best_test_accuracy_mean"]) == ("1", "0.5")
    (group,) = _csv(capsys, tmp_path, "--by", "seed", "--status", "interrupted")
    assert (group["n"], group["best_test_accuracy_mean"]) == ("1", "0.25")
    assert "50.00 ± – %" in _answer(capsys, tmp_path, "--by", "seed")


def test_values_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    for name, accuracy in (("a", math.nan), ("b", 0.5), ("c", math.inf)):
        _make(tmp_path / name, [accuracy])
    (group,) = group_runs(find_runs([tmp_path]), ["seed"], "test_accuracy", "last")
    assert (group.n, group.mean) == (1, 0.5)
    assert math.isnan(group.stdev)


def test_status_filters_and_says_why(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["run"] for row in _csv(capsys, sweep, "--status", "failed")] == ["local,2,3"]
    lines = _answer(capsys, sweep, "--status", "failed").splitlines()
    assert lines[-1] == "local,2,3: the training loss is nan"
    assert _answer(capsys, sweep, "--status", "running") == "none of 12 runs is running\n"
    assert _csv(capsys, sweep, "--status", "running") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "norm.nmae"], "unknown key 'norm.nmae'; valid: data.batch_size, data.name, "),
        (["--metric", "accuracy"], "unknown metric 'accuracy'; valid: epoch, step, test_accuracy"),
        (["--csv", "nowhere/table.csv"], "No such file or directory: 'nowhere/table.csv'"),
        (["--plot", "nowhere/a.png"], "No such file or directory"),
        (["--plot", "picture.xyz"], "'xyz' is not supported (supported formats: "),
        (["--plot", "picture.png", "--status", "running"], "nothing to plot"),
        (["--plot", "picture.png", "--status", "running", "--by", "seed"], "nothing to plot"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    _make(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert said in _refused(capsys, ".", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_csv_goes_to_a_file_beside_the_table(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.csv"
    shown = _answer(capsys, sweep, "--by", "norm.name", "--csv", file)
    assert shown == _answer(capsys, sweep, "--by", "norm.name")
    assert file.read_text() == _answer(capsys, sweep, "--by", "norm.name", "--csv", "-")


def test_table_fits_the_terminal_alone(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(sweep.parent / "a run of a rather long name beside the sweep")
    whole = _answer(capsys, sweep.parent, "--status", "finished")
    assert "…" not in whole
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, cut in ((80, True), (130, True), (200, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = _answer(capsys, sweep.parent, "--status", "finished").splitlines()
        assert max(map(len, lines)) <= columns
        assert any("…" in line for line in lines) == cut


@pytest.mark.parametrize("count", [9, 30])
def test_runs_are_plotted_over_the_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    for seed in range(count):
        _make(tmp_path / f"${seed}$", (0.25, 0.5 + seed / 64, 0.5), config={"seed": seed})
    _make(tmp_path / "nothing yet", [], status=None)
    file = tmp_path / "picture.png"
    _answer(capsys, tmp_path, "--plot", file)
    assert _painted(file) > 0.003


@pytest.mark.parametrize(
    "by",
    [
        ["norm.name"],
        ["norm.name", "data.batch_size"],
        ["model.name", "norm.name", "optim.clip_norm", "seed"],
    ],
)
def test_groups_are_plotted(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: list[str]
) -> None:
    _make(sweep / "refused", [0.5], config={"seed": None, "data.batch_size": 1})
    file = tmp_path / "picture.png"
    _answer(capsys, sweep, "--by", *by, "--plot", file)
    assert _painted(file) > 0.002
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "picture.png"}


def test_command_starts_without_torch_hydra_and_matplotlib() -> None:
    code = (
        "import sys, syncbn.train.run.command;"
        "print(*[name for name in ('torch', 'matplotlib', 'hydra') if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert loaded.stdout.split() == []
