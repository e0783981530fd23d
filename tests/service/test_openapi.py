"""Requests that are made up from the API's own description."""

import sys
from pathlib import Path

import pytest

from tests.service.conftest import write_small_bundle
from tests.support.processes import run
from tests.support.serving import served

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.long
def test_whatever_is_sent_is_answered_as_described(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_small_bundle(models / "one")
    with served(models, tmp_path / "log", "--max-body-bytes", "100000") as service:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", "15", "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
        result = run(command, tmp_path, 300)
        assert result.returncode == 0, result.stdout[-5000:]
        assert service.ask("GET", "/v2/health/live").is_success
    assert '"level":"error"' not in service.log.read_text()
