import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run

PROGRAM = """
import logging, warnings
from service import logs
logs.configure({form!r})
logs.request_id_var.set("id-1")
log = logging.getLogger("service.x")
log.info("hello %s", "wor\\nld")
logs.request_line(
    method="GET", path="/a\\n\\x1b[31mforged", route="/a", status=200, seconds=0.25, model=None
)
logging.getLogger("uvicorn.error").info("Application startup complete.")
assert not logging.getLogger("uvicorn.access").hasHandlers()
warnings.warn("careful")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def _lines(form: str, tmp_path: Path) -> list[str]:
    result = run([sys.executable, "-c", PROGRAM.format(form=form)], tmp_path)
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()


@pytest.mark.parametrize("form", ["json", "auto"])
def test_lines_are_json_where_no_person_looks(form: str, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in _lines(form, tmp_path)]
    hello, request, started, warning, failed = lines
    assert hello["event"] == "hello wor\nld"
    assert (hello["level"], hello["logger"], hello["request_id"]) == ("info", "service.x", "id-1")
    assert (
        request.items()
        >= {
            "event": "request",
            "method": "GET",
            "path": "/a\n\x1b[31mforged",
            "status": 200,
            "seconds": 0.25,
        }.items()
    )
    assert "model" not in request
    assert started["event"] == "Application startup complete."
    assert "careful" in warning["event"]
    assert failed["level"] == "error"
    assert "ZeroDivisionError: division by zero" in failed["exception"]


def test_text_cannot_be_forged_either(tmp_path: Path) -> None:
    lines = _lines("text", tmp_path)
    assert r"hello wor\nld" in lines[0]
    assert r"/a\n\x1b[31mforged" in lines[1]
    assert "request_id=id-1" in lines[1]
    assert "Application startup complete." in lines[2]
    assert "ZeroDivisionError: division by zero" in lines[-1]
    assert not any("\x1b" in line for line in lines)


HOSTILE = """
import logging
from service import logs
logs.configure({form!r})
log = logging.getLogger("service.x")
end = "\\r\\n2026-01-01T00:00:00Z [error] {{}}\\x1b[31m\\x7f\\x85\\x9b31m\\u2028\\u202e\\udcff"
log.info("a message %s", end)
logs.request_line(path="/a" + end, model=end, route="/a", seconds=0.25)
logs.request_line(path="\\x01" * 70_000, model="\\x85" * 70_000, route="/a", seconds=0.25)
log.warning("of no type that JSON has: %s", end, extra=dict(request=1))
try:
    raise ValueError(end.replace("\\udcff", ""))
except ValueError:
    log.exception("an exception")
"""


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_text_costs_or_forges_a_line(form: str, encoding: str, tmp_path: Path) -> None:
    result = run(
        [sys.executable, "-c", HOSTILE.format(form=form)], tmp_path, PYTHONIOENCODING=encoding
    )
    assert result.returncode == 0, result.stdout
    assert "Logging error" not in result.stdout
    assert not set(result.stdout) & set("\r\x1b\x7f\x85\x9b\u2028\u202e")
    lines = result.stdout.splitlines()
    if form == "json":
        assert [json.loads(line)["level"] for line in lines] == [
            *("info", "info", "info", "warning", "error")
        ]
    else:
        starts = [line.split()[1] for line in lines if not line.startswith("    ")]
        assert starts == [*("[info", "[info", "[info", "[warning", "[error")]
    # What several processes may write to one pipe without mixing their lines.
    assert all(len(line.encode()) < 4096 for line in lines[:4])


def test_tests_have_their_own_logging() -> None:
    assert logging.getLogger("service").handlers == []
