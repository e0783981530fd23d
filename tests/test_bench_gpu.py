"""The layer's budget on a GPU, counted without one; and the script that measures it there runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import REPOSITORY, run

COMMAND = [sys.executable, "-m", "scripts.bench.gpu"]


# In a process of its own, because kernels are imported either to be compiled or to be interpreted.
def _counted(section: str, tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "figures.json"
    result = run([*COMMAND, "--budget", "--only", section, "--json", str(file)], REPOSITORY)
    assert result.returncode == 0, result.stdout
    return json.loads(file.read_text())[section]


def test_step_moves_no_more_bytes_than_it_must(tmp_path: Path) -> None:
    rows = _counted("bytes", tmp_path)
    for row in rows:
        # Each value of a large tensor is read and written as often as necessary.
        assert row["tensors / least"] == 1, row
        assert row["all / least"] <= row["sectors / least"]
    # With vectors of one value per channel, if these are small beside the tensor.
    for row, layout in zip(rows, ["channels_last", "contiguous"], strict=False):
        assert row["layout"] == layout
        assert row["all / least"] <= 1.02
    assert [row["torch's / least"] for row in rows if row["variant"] == "plain"] == [1, 1]


def test_step_has_few_launches_and_the_host_never_waits(tmp_path: Path) -> None:
    rows = _counted("launches", tmp_path)
    assert {(row["W"], row["variant"]) for row in rows} == {
        (world_size, variant)
        for world_size in (1, 2)
        for variant in ("plain", "relu", "residual + relu")
    }
    for row in rows:
        names = row["names"].split(", ")
        assert len(names) == row["ours total"] <= (9 if row["W"] == 1 else 12)
        assert ("allreduce_" in names) == (row["W"] == 2)
        assert row["ours waits"] == 0
        if row["W"] == 2:
            assert row["torch's total"] > row["ours total"]
            assert row["torch's waits"] == 3  # its masks of empty ranks


def test_step_needs_little_memory_beside_its_results(tmp_path: Path) -> None:
    rows = _counted("memory", tmp_path)
    assert len(rows) == 12
    for row in rows:
        assert 0 < row["ours, contiguous KB"] < 1000
        assert 0 < row["ours, channels_last KB"] < 1000


def test_what_cannot_be_measured_is_refused() -> None:
    result = run([*COMMAND, "--tiny", "--only", "bytes"], REPOSITORY)
    assert result.returncode == 2
    assert "--only bytes is a section of another run; see --budget" in result.stdout
    result = run([*COMMAND, "--tiny", "--write"], REPOSITORY)
    assert result.returncode == 2
    assert "--tiny measures nothing that could be written into docs/" in result.stdout


@pytest.mark.long
def test_every_section_runs_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [*COMMAND, "--tiny", "--json", str(file), "--plot", str(tmp_path)]
    result = run(command, REPOSITORY, timeout_s=600)
    assert result.returncode == 0, result.stdout
    assert "failed:" not in result.stdout
    assert "interpreted: not a measurement" in result.stdout
    figures = json.loads(file.read_text())
    sections = ["kernels", "layers", "resnet", "ranks", "observed", "verdicts"]
    assert list(figures) == ["machine", *sections]
    assert all(figures[name] for name in sections)
    assert [row["outcome"] for row in figures["ranks"]] == ["right"]
    for name in ("kernels", "layers", "resnet"):
        assert (tmp_path / f"gpu-{name}.png").read_bytes().startswith(b"\x89PNG")
