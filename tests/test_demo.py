"""`make demo`, but for the installation."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, run


# The README's commands, which another test runs, train and serve the same.
@pytest.mark.long
def test_demo_trains_serves_and_queries(tmp_path: Path) -> None:
    result = run([sys.executable, str(REPOSITORY / "scripts" / "demo.py")], tmp_path, 300)
    assert result.returncode == 0, result.stdout
    rows = re.findall(r"^ +(\d) +(\d) +([01]\.\d{4})$", result.stdout, re.MULTILINE)
    assert len(rows) == 12
    found = re.search(r"served accuracy: (\d+\.\d+)% \((\d+) of 360 test images\)", result.stdout)
    assert found
    assert float(found[1]) >= 96
    assert "service stopped" in result.stdout
