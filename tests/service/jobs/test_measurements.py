import csv
import io
import itertools
import json
import math
from pathlib import Path

import pytest

from service.jobs.measurements import best_epoch, read_lines, to_csv


def _write(file: Path, count: int) -> Path:
    file.write_text(
        "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, count + 1))
    )
    return file


@pytest.mark.parametrize(
    ("count", "limit"), [(0, 5), (1, 5), (5, 5), (6, 5), (9, 5), (11, 5), (997, 10)]
)
def test_lines_are_thinned_out_evenly_and_the_ends_stay(
    tmp_path: Path, count: int, limit: int
) -> None:
    lines = read_lines(_write(tmp_path / "m", count), limit=limit)
    steps = [line["step"] for line in lines]
    assert len(steps) <= limit
    assert len(steps) >= min(count, limit // 2)
    assert steps == sorted(set(steps))
    if count:
        assert (steps[0], steps[-1]) == (1, count)
    gaps = [later - step for step, later in itertools.pairwise(steps)]
    assert not gaps or max(gaps) <= 4 * max(1, count // limit)


def test_limit_of_one_is_the_newest(tmp_path: Path) -> None:
    assert [line["step"] for line in read_lines(_write(tmp_path / "m", 9), limit=1)] == [9]


def test_only_later_steps_are_given(tmp_path: Path) -> None:
    file = _write(tmp_path / "m", 20)
    assert [line["step"] for line in read_lines(file, limit=99, after=17)] == [18, 19, 20]
    assert read_lines(file, limit=99, after=20) == []


def test_damaged_and_unfinished_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(b'{"step": 1, "loss": NaN}\nbroken\n[1]\n\xff\n{"step": 2}\n{"step": 3')
    lines = read_lines(file, limit=9)
    assert [line["step"] for line in lines] == [1, 2]
    assert math.isnan(lines[0]["loss"])
    assert read_lines(tmp_path / "none", limit=9) == []


def test_table_has_a_column_for_each_key() -> None:
    table = to_csv([{"step": 1, "loss": 0.5}, {"step": 2, "accuracy": 0.25, "best": True}])
    rows = list(csv.DictReader(io.StringIO(table)))
    assert rows == [
        {"step": "1", "loss": "0.5", "accuracy": "", "best": ""},
        {"step": "2", "loss": "", "accuracy": "0.25", "best": "True"},
    ]


def test_best_epoch_is_the_last_that_was_noted() -> None:
    lines = [{"epoch": 1, "best": True}, {"epoch": 2, "best": True}, {"epoch": 3, "best": False}]
    assert best_epoch(lines)["epoch"] == 2
    assert best_epoch([{"epoch": 1}, {"epoch": 2}])["epoch"] == 2
    assert best_epoch([]) == {}
