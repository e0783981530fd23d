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
@pytest.mark.parametrize("jobs", [False, True])
def test_whatever_is_sent_is_answered_as_described(tmp_path: Path, jobs: bool) -> None:
    models = tmp_path / "models"
    write_small_bundle(models / "one")
    options = ["--max-body-bytes", "100000"]
    # Streams have no end, and so are not asked for here.
    which = ["--include-path-regex", "^/v1/", "--exclude-path-regex", "/events$"]
    if jobs:
        options += ["--jobs", str(tmp_path / "jobs"), "--no-dispatcher"]
    with served(models, tmp_path / "log", *options) as service:
        made = [service.ask("POST", "/v1/jobs", json={"name": f"job-{n}"}) for n in range(3)]
        assert {answer.status_code for answer in made} == {201 if jobs else 404}
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", "15", "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
        result = run(command + (which if jobs else []), tmp_path, 300)
        assert result.returncode == 0, result.stdout[-5000:]
        assert service.ask("GET", "/v2/health/live").is_success
    assert '"level":"error"' not in service.log.read_text()
