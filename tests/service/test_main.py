import re
import signal
import socket
import subprocess
import sys
import time
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
        (["--models", "x", "--host", ""], 2, "--host: String should have at least 1"),
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
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run([*SERVE, "--models", str(models), "--port", port], tmp_path)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stdout


def test_help_describes_every_option(tmp_path: Path) -> None:
    result = run([*SERVE, "--help"], tmp_path)
    assert result.returncode == 0
    shown = " ".join(result.stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
        assert field.description in shown


def test_service_stops_on_sigterm_although_a_client_stalls(models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*SERVE, "--models", str(models), "--port", "0", "--timeout-s", "1"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while "startup complete" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", log.read_text())[0])
        with socket.create_connection(("127.0.0.1", port)) as stalled:
            head = b"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
            stalled.sendall(head)
            stalled.settimeout(30)
            assert stalled.recv(100).startswith(b"HTTP/1.1 408 ")
            server.terminate()
            assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
