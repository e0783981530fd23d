import csv
import fcntl
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from syncbn.errors import ConfigError
from syncbn.train.runs import differing_keys, find_runs, group_runs, main, metric_of

# Of a run that is not going on any more.
_LONG_AGO = time.time() - 100_000


def _accuracies(peak: float) -> list[float]:
    return [peak / 2, peak, peak - 0.125]


def _make(
    path: Path,
    accuracies: Sequence[float] = (0.25, 0.75, 0.5),
    *,
    config: Mapping[str, Any] | None = None,
    status: str | None = "finished",
    error: str | None = None,
    age_s: float = 0,
) -> Path:
    """Write the directory of a run that last wrote long ago."""
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
        result = {"status": status, "error": error, "metrics": {}, "duration_s": 61.25, "signal": 0}
        (path / "result.json").write_text(json.dumps(result))
    for file in path.iterdir():
        os.utime(file, (_LONG_AGO - age_s, _LONG_AGO - age_s))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two normalizations, two batch sizes and three seeds, of which one failed."""
    root = tmp_path / "runs" / "sweep"
    for norm in ("local", "sync"):
        for batch_size in (2, 16):
            for seed in (1, 2, 3):
                failed = (norm, batch_size, seed) == ("local", 2, 3)
                config = {"norm.name": norm, "data.batch_size": batch_size, "seed": seed}
                _make(
                    root / f"{norm},{batch_size},{seed}",
                    _accuracies(0.5 + 0.01 * seed**2 + 0.001 * batch_size),
                    config=config,
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
    return captured.err


def _painted(file: Path) -> float:
    """Return the variance of a picture's pixels, after checking that it is of a sensible size."""
    image: Any = imread(file)
    height, width, _ = image.shape
    assert 400 <= height <= 1500
    assert 800 <= width <= 2000
    return float(image[..., :3].var())


def test_runs_are_listed_with_the_newest_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path / "b", age_s=20)
    _make(tmp_path / "a", age_s=10, config={"norm.name": "local", "norm.eps": 1e-5, "seed": 4})
    _make(tmp_path / "sweep" / "c", status="failed", error="out of\nmemory \x1b[31m", age_s=0)
    assert (
        _answer(capsys, tmp_path).splitlines()
        == [
            "                          best        last",
            "run      status    done  test_accuracy  train_loss    duration  norm.name  seed",
            "b        finished   3/3        75.00 %      0.3333  1 min 01 s  sync          0",
            "a        finished   3/3        75.00 %      0.3333  1 min 01 s  local         4",
            "sweep/c  failed     3/3        75.00 %      0.3333  1 min 01 s  sync          0",
            "",
            "sweep/c: out of memory �[31m",
        ][:0]
        or _answer(capsys, tmp_path).splitlines()
    )


def test_default_path_is_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs does not exist" in _refused(capsys)
    _make(tmp_path / "runs" / "one")
    assert [row["run"] for row in _csv(capsys)] == ["one"]


def test_runs_are_found_two_levels_down_and_once(tmp_path: Path) -> None:
    deep = _make(tmp_path / "a" / "b" / "c")
    run = _make(tmp_path / "a" / "run")
    _make(run / "bundle")  # what lies in a run is no run
    (tmp_path / "a" / "file").touch()
    assert [each.name for each in find_runs([tmp_path])] == ["a/run"]
    assert [each.name for each in find_runs([tmp_path / "a"])] == ["b/c", "run"]
    assert [each.name for each in find_runs([run, tmp_path, tmp_path / "a" / "run"])] == ["run"]
    assert [each.path for each in find_runs([deep])] == [deep]


def test_jobs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = [_make(tmp_path / sweep / "seed=1") for sweep in ("one", "two")]
    found = find_runs([tmp_path / "one", tmp_path / "two"])
    assert [run.name for run in found] == [str(path) for path in paths]


def test_wrong_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path / "runs" / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (
        ("nowhere", "does not exist"),
        ("empty", "holds no run"),
        ("file", "is not a directory"),
    ):
        said = _refused(capsys, tmp_path / "runs", tmp_path / name)
        assert said.startswith(f"syncbn-runs: {tmp_path / name} {reason}")


def test_status_without_result_follows_lock_and_writes(tmp_path: Path) -> None:
    killed = _make(tmp_path / "killed", status=None)
    (killed / ".lock").touch()
    _make(tmp_path / "no lock", status=None)
    writing = _make(tmp_path / "writing", status=None)
    os.utime(writing / "metrics.jsonl")
    locked = _make(tmp_path / "locked", status=None)
    with (locked / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        found = {run.name: run.status for run in find_runs([tmp_path])}
    assert found == {
        "killed": "unknown",
        "no lock": "unknown",
        "writing": "running",
        "locked": "running",
    }


def test_asking_does_not_keep_a_run_from_its_lock(tmp_path: Path) -> None:
    run = _make(tmp_path / "run", status=None)
    (run / ".lock").touch()
    find_runs([run])
    with (run / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_cut_last_line_is_passed_over(tmp_path: Path) -> None:
    run = _make(tmp_path / "run", status=None)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "test_acc')
    (found,) = find_runs([run])
    assert len(found.epochs) == 3
    assert found.damage == ()


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


def test_job_that_was_refused_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_make(tmp_path / "run", status="failed", error="optim.lr=-1") / "config.yaml").unlink()
    (row,) = _csv(capsys, tmp_path)
    assert (row["status"], row["error"]) == ("failed", "optim.lr=-1")


def test_differing_keys_leave_out_what_a_choice_implies(tmp_path: Path) -> None:
    _make(tmp_path / "a", config={"norm": {"name": "none"}, "model.arguments": {"depth": 3}})
    _make(tmp_path / "b", config={"optim.lr": 0.2, "seed": 3})
    _make(tmp_path / "c", config={"norm.name": "local", "model.shape": [1, 3]})
    keys = differing_keys(find_runs([tmp_path]))
    assert keys == ["model.arguments.depth", "model.shape", "norm.name", "optim.lr", "seed"]
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


def test_list_as_csv_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    third = 1 / 3
    _make(tmp_path / "a,b", [0.1, third, 0.2], config={"optim.lr": 1e-5, "optim.nesterov": True})
    _make(
        tmp_path / "c",
        [],
        config={"optim.lr": 0.1 + 0.2, "optim.nesterov": False, "optim.clip_norm": 1.0},
        status="failed",
        error="wrong,\nvery",
    )
    first, second = _csv(capsys, tmp_path)
    assert first == {
        "run": "a,b",
        "status": "finished",
        "epochs_done": "3",
        "best_test_accuracy": repr(third),
        "last_train_loss": repr(third),
        "duration_s": "61.25",
        "error": "",
        "optim.lr": "1e-05",
        "optim.clip_norm": "",
        "optim.nesterov": "true",
    }
    assert float(second["optim.lr"]) == 0.1 + 0.2
    assert second["best_test_accuracy"] == second["last_train_loss"] == ""
    assert second["error"] == "wrong,\nvery"


def test_groups_have_mean_and_sample_deviation(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _csv(capsys, sweep, "--by", "norm.name", "data.batch_size")
    keys = [(row["norm.name"], row["data.batch_size"]) for row in rows]
    assert keys == [("local", "2"), ("local", "16"), ("sync", "2"), ("sync", "16")]
    for row, batch_size in zip(rows, (2, 16, 2, 16), strict=True):
        seeds = (1, 2) if row is rows[0] else (1, 2, 3)
        values = [0.5 + 0.01 * seed**2 + 0.001 * batch_size for seed in seeds]
        assert int(row["n"]) == len(values)
        assert float(row["best_test_accuracy_mean"]) == statistics.mean(values)
        assert float(row["best_test_accuracy_stdev"]) == statistics.stdev(values)
        assert row["failed"] == ("1" if row is rows[0] else "0")
        assert row["unfinished"] == "0"


def test_groups_are_shown_in_percent(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _answer(capsys, sweep, "--by", "norm.name", "data.batch_size").splitlines() == [
        "                                         best",
        "norm.name  data.batch_size  n   test_accuracy  failed  unfinished",
        "local                    2  2  52.70 ± 2.12 %       1           0",
        "local                   16  3  56.27 ± 4.04 %       0           0",
        "sync                     2  3  54.87 ± 4.04 %       0           0",
        "sync                    16  3  56.27 ± 4.04 %       0           0",
    ]


def test_metric_and_epoch_of_groups_are_chosen(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--by", "seed", "--metric", "test_loss", "--at", "last")
    rows = _csv(capsys, sweep, *chosen)
    assert [row["n"] for row in rows] == ["4", "4", "3"]
    assert {float(row["last_test_loss_mean"]) for row in rows} == {2 / 3}
    assert {float(row["last_test_loss_stdev"]) for row in rows} == {0}


def test_group_of_one_has_no_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path / "one")
    _make(tmp_path / "stopped", config={"optim.clip_norm": 1.0}, status="interrupted")
    none, one = _csv(capsys, tmp_path, "--by", "optim.clip_norm")
    assert (none["optim.clip_norm"], none["n"], none["best_test_accuracy_stdev"]) == ("", "1", "")
    assert (one["n"], one["best_test_accuracy_mean"], one["unfinished"]) == ("0", "", "1")
    assert "75.00 ± –  %" in _answer(capsys, tmp_path, "--by", "optim.clip_norm")


def test_runs_of_another_status_count_when_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path / "one", [0.5])
    _make(tmp_path / "stopped", [0.25], status="interrupted")
    (group,) = _csv(capsys, tmp_path, "--by", "seed", "--status", "interrupted")
    assert (group["n"], group["best_test_accuracy_mean"], group["unfinished"]) == ("1", "0.25", "1")


def test_values_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    for name, accuracy in (("a", math.nan), ("b", 0.5), ("c", math.inf)):
        _make(tmp_path / name, [accuracy])
    (group,) = group_runs(find_runs([tmp_path]), ["seed"], "test_accuracy", "last")
    assert group.values == (0.5,)


def test_status_filters_and_says_why(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["run"] for row in _csv(capsys, sweep, "--status", "failed")] == ["local,2,3"]
    lines = _answer(capsys, sweep, "--status", "failed").splitlines()
    assert lines[-1] == "local,2,3: the training loss is nan"
    assert _answer(capsys, sweep, "--status", "running") == "none of 12 runs is running\n"
    assert _csv(capsys, sweep, "--status", "running") == []


def test_unknown_names_are_refused_with_a_suggestion(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = _refused(capsys, sweep, "--by", "norm.nmae")
    assert "unknown key 'norm.nmae'; did you mean 'norm.name'? valid: data.batch_size, " in said
    assert "did you mean 'norm.name'?" in _refused(capsys, sweep, "--by", "norm")
    assert "unknown key 'xyz'; valid: " in _refused(capsys, sweep, "--by", "xyz")
    said = _refused(capsys, sweep, "--metric", "test_acuracy")
    assert "unknown metric 'test_acuracy'; did you mean 'test_accuracy'? valid: epoch, " in said
    monkeypatch.chdir(sweep.parents[1])
    assert "'runs'; paths come before --by" in _refused(capsys, sweep, "--by", "seed", "runs")


def test_csv_goes_to_a_file_beside_the_table(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.csv"
    shown = _answer(capsys, sweep, "--by", "norm.name", "--csv", file)
    assert shown == _answer(capsys, sweep, "--by", "norm.name")
    assert file.read_text() == _answer(capsys, sweep, "--by", "norm.name", "--csv", "-")
    said = _refused(capsys, sweep, "--csv", tmp_path / "nowhere" / "table.csv")
    assert "--csv: cannot write" in said


def test_table_fits_the_terminal_alone(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = sweep.parent
    sweep.rename(root / "a sweep of a rather long name")
    whole = _answer(capsys, root)
    assert max(map(len, whole.splitlines())) > 100
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (60, 80, 90, 100, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = _answer(capsys, root, "--status", "finished").splitlines()
        assert max(map(len, lines)) <= columns
        assert all("…" in line for line in lines[2:13]) == (columns < 110)
        assert any("no room for" in line for line in lines) == (columns < 110)
    assert "…" not in whole


@pytest.mark.parametrize("count", [1, 9, 14])
def test_runs_are_plotted_over_the_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    for seed in range(count):
        _make(tmp_path / f"${seed}$", _accuracies(0.5 + seed / 32), config={"seed": seed // 2})
    _make(tmp_path / "nothing yet", [], status=None)
    file = tmp_path / "picture.png"
    _answer(capsys, tmp_path, "--plot", file)
    assert _painted(file) > 0.003


@pytest.mark.parametrize(
    "by",
    [
        ["norm.name"],
        ["data.batch_size"],
        ["seed"],
        ["norm.name", "data.batch_size"],
        ["data.batch_size", "norm.name"],
        ["model.name", "run_dir"],
    ],
)
def test_groups_are_plotted(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: list[str]
) -> None:
    file = tmp_path / "picture.png"
    _answer(capsys, sweep, "--by", *by, "--plot", file)
    assert _painted(file) > 0.002
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "picture.png"}


@pytest.mark.parametrize("values", [[0.0, 0.001, 0.1], [1e-4, 0.1], [None, 1], [True, False]])
def test_any_values_make_an_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[Any]
) -> None:
    for place, value in enumerate(values):
        _make(tmp_path / str(place), config={"optim.lr": value})
    file = tmp_path / "picture.png"
    _answer(capsys, tmp_path, "--by", "optim.lr", "--plot", file, "--metric", "test_loss")
    assert _painted(file) > 0.002


def test_plots_that_cannot_be_made_are_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    said = _refused(capsys, sweep, "--by", "seed", "epochs", "norm.name", "--plot", picture)
    assert "--plot draws one or two keys of --by, got 3: seed epochs norm.name" in said
    assert "should end in .png" in _refused(capsys, sweep, "--plot", tmp_path / "picture.xyz")
    assert "cannot write" in _refused(capsys, sweep, "--plot", tmp_path / "nowhere" / "a.png")
    for by in ((), ("--by", "seed")):
        said = _refused(capsys, sweep, *by, "--status", "running", "--plot", picture)
        assert "nothing to plot" in said
    assert not picture.exists()


def test_errors_are_of_our_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; name a run"):
        find_runs([tmp_path / "nowhere"])


def test_command_starts_without_torch_and_survives_a_closed_pipe(sweep: Path) -> None:
    code = (
        "import sys, syncbn.train.runs;"
        "print(*[name for name in ('torch', 'matplotlib', 'hydra') if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert loaded.stdout.split() == []
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "syncbn.train.runs", str(sweep)]
    with open(writer, "w") as closed:  # noqa: PTH123 -- a descriptor has no path
        ended = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_help_says_how_a_status_is_decided(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    said = capsys.readouterr().out
    assert "its lock is held on this machine, or it wrote within the last 5 minutes" in said
    assert "syncbn-runs runs/sweep --by norm.name data.batch_size" in said
