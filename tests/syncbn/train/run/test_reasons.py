import errno
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.errors import ConfigError, DataError, TrainingError
from syncbn.train.run import reasons
from syncbn.train.run.reasons import presumed, reason_of


def _caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("x"), "config"),
        (DataError("x"), "data"),
        (TrainingError("x"), "internal"),
        (TrainingError("x").because(reasons.NOT_FINITE), "not_finite"),
        (ConfigError("x").because(reasons.OUT_OF_MEMORY), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("x"), "out_of_memory"),
        (FULL, "disk_full"),
        (OSError(errno.EDQUOT, "x"), "disk_full"),
        (OSError(errno.EACCES, "x"), "internal"),
        (_caused(TrainingError("x"), FULL), "disk_full"),
        (_caused(TrainingError("x").because(reasons.PUBLISH), FULL), "publish"),
        (ValueError("no space left on device"), "internal"),  # not by what it says
    ],
)
def test_reason_is_that_of_the_exception_or_of_its_cause(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    assert reason in reasons.ALL


def test_reason_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TrainingError("x").because(reasons.DISK_FULL)))
    assert (str(error), reason_of(error)) == ("x", "disk_full")


def test_exception_of_the_user_has_the_reason_that_its_place_says() -> None:
    assert reason_of(ValueError("x"), reasons.RANK_FAILED) == "rank_failed"
    assert reason_of(torch.OutOfMemoryError("x"), reasons.RANK_FAILED) == "out_of_memory"


def test_circle_of_causes_ends() -> None:
    error = ValueError("x")
    error.__cause__ = error
    assert reason_of(error) == "internal"


def test_result_without_a_reason_has_that_of_its_status() -> None:
    said = [("finished", 0), ("interrupted", 143), ("failed", 2), ("failed", 1), ("lost", 137)]
    found = [presumed(status, code) for status, code in said]
    assert found == ["finished", "stopped", "config", "internal", "killed"]


def test_what_is_retried_is_known_and_neither_wrong_nor_stopped() -> None:
    assert set(reasons.ALL) > reasons.RETRIED
    assert not reasons.RETRIED & {"finished", "stopped", "config", "data", "not_finite"}


def test_reasons_are_all_documented() -> None:
    page = (Path(__file__).parents[4] / "docs" / "training.md").read_text()
    table = page[page.index("| `reason` | what happened |") :].split("\n\n")
    assert re.findall(r"^\| `(\w+)` \|", table[0], re.M)[1:] == list(reasons.ALL)
    assert set(re.findall(r"`(\w+)`", table[1].partition(". ")[0])) == reasons.RETRIED


def test_what_a_run_tells_is_read_without_torch() -> None:
    code = (
        "import sys\n"
        "import syncbn.train.run.attempts, syncbn.train.run.directory\n"
        "from syncbn.train.run.reasons import reason_of\n"
        "assert reason_of(MemoryError()) == 'out_of_memory'\n"
        "assert 'torch' not in sys.modules\n"
    )
    checkout = Path(__file__).parents[4]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=checkout)
