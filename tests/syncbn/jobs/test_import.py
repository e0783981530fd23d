"""The jobs are there without torch and without HTTP, so that a service starts and answers fast."""

import subprocess
import sys

import pytest

_HEAVY = {"torch", "numpy", "fastapi", "httpx2", "uvicorn", "starlette", "matplotlib", "wandb"}


@pytest.mark.parametrize("module", ["syncbn.jobs.dispatch.command", "syncbn.jobs.engines.local"])
def test_jobs_load_neither_torch_nor_http(module: str) -> None:
    code = f"import sys, {module}; print(*{_HEAVY} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []
