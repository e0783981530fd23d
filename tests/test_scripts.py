"""The scripts' sections that time nothing; what the others time is no matter for a test."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench.layer.against import SMALLEST, compare, report
from tests.support.processes import REPOSITORY, run


def _figures(section: str, tmp_path: Path) -> list[dict[str, float]]:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "scripts.bench.layer", "--only", section, "--json", str(file)]
    result = run(command, REPOSITORY)
    assert result.returncode == 0, result.stdout
    return json.loads(file.read_text())[section]


def test_layer_keeps_no_more_for_backward_than_torchs(tmp_path: Path) -> None:
    rows = _figures("memory", tmp_path)
    for row in rows:
        count = 8 / 1024  # which torch's layer knows by the input's shape, in KiB
        assert row["SyncBatchNorm"] <= row["nn.BatchNorm2d"] + count
        saved = row["nn.BatchNorm2d, ReLU"] - row["SyncBatchNorm with ReLU"]
        assert saved == pytest.approx(row["x"], rel=0.02)  # one activation, less β


def test_model_of_costs_is_that_of_its_formulas(tmp_path: Path) -> None:
    rows = _figures("model", tmp_path)
    (row,) = [r for r in rows if r.get("C") == 256 and r["W"] == 8 and "Ether" in str(r["network"])]
    alpha_us, per_byte_us, both_sums = 30, 1 / 1250, 32 * 256 + 8
    assert row["tree µs"] == pytest.approx(2 * 6 * alpha_us + 6 * both_sums * per_byte_us)
    assert row["ring µs"] == pytest.approx(2 * 14 * alpha_us + 14 / 8 * both_sums * per_byte_us)


@pytest.mark.long
def test_layer_is_timed_beside_that_of_another_checkout() -> None:
    case = {"dtype": "float32", "shape": SMALLEST, "layout": "channels_last"}
    rows = compare(REPOSITORY, turns=1, starts=1, world_sizes=[2], cases=[case])
    (row,) = rows
    assert {"W": 2, **case}.items() <= row.items()
    for name in ("nn.BatchNorm2d µs", "before µs", "after µs", "after / before"):
        assert row[name] > 0
    assert "W = 2, float32, channels_last: nn.BatchNorm2d " in report(rows)


@pytest.mark.long
def test_checkout_without_a_layer_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"a rank of {tmp_path} ended with 1"):
        compare(tmp_path, turns=1, starts=1, world_sizes=[1])


@pytest.mark.long
def test_claims_of_the_chapter_are_drawn(tmp_path: Path) -> None:
    why = tmp_path / "why"
    command = [sys.executable, "-m", "scripts.chapter", str(why)]
    result = run([*command, "--only", "chain", "delta"], REPOSITORY)
    assert result.returncode == 0, result.stdout
    assert f"data and pictures are in {why}" in result.stdout
    for name in ("chain", "delta"):
        assert json.loads((why / f"{name}.json").read_text())["rows"]
        assert (why / f"why-{name}.png").read_bytes().startswith(b"\x89PNG")
    (why / "why-delta.png").unlink()
    again = run([*command, "--only", "delta", "rates", "--draw"], REPOSITORY)
    assert again.returncode == 1
    assert f"there is no {why}/rates.json to draw; leave out --draw" in again.stdout
    assert (why / "why-delta.png").exists()


@pytest.mark.long
def test_claims_cannot_be_drawn_where_nothing_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (str(file), "/proc"):  # the latter exists, and takes no file from anybody
        result = run([sys.executable, "-m", "scripts.chapter", place], REPOSITORY)
        assert result.returncode == 1
        assert result.stdout.startswith(f"scripts.chapter: cannot write to {place}: ")
        assert "name another directory" in result.stdout


@pytest.mark.long
def test_jobs_under_kills_all_finish_once_and_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "scripts.bench.jobs", "--jobs", "20", "--starts", "1"]
    result = run([*command, "--kill-every", "8", "--json", str(file)], REPOSITORY, timeout_s=1800)
    assert result.returncode == 0, result.stdout
    figures = json.loads(file.read_text())
    assert figures["states"] == {"finished": 22}  # one before is not timed
    assert figures["finished once"] == 22
    assert figures["wrong"] == []
    assert "| jobs that finished exactly once | 22 | all 22 |" in result.stdout
