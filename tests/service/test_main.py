import sys
from pathlib import Path

import pytest

from service.settings import Settings
from tests.support.processes import run

SERVE = [sys.executable, "-m", "service"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--models: Field required; see --help"),
        (["--models", "x", "--port", "http"], 2, "--port: Input should be a valid integer"),
        (["--models", "x", "--port", "70000"], 2, "--port: Input should be less than or equal"),
        (["--models", "nowhere"], 1, "nowhere is not a directory"),
        (["--models", "."], 1, "holds no bundle; train a model"),
    ],
)
def test_wrong_option_is_explained_in_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = run([*SERVE, *arguments], tmp_path)
    assert result.returncode == code
    assert result.stdout.startswith("syncbn-serve: ")
    assert message in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_taken_port_is_explained(models: Path, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run([*SERVE, "--models", str(models), "--port", port], tmp_path)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stdout


def test_help_describes_every_option(tmp_path: Path) -> None:
    result = run([*SERVE, "--help"], tmp_path)
    assert result.returncode == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.stdout
        assert field.description
        assert field.description.split()[0] in result.stdout
