import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from service.settings import Settings
from tests.service.conftest import write_small_bundle
from tests.support.processes import run
from tests.support.serving import Service, served

SERVE = [sys.executable, "-m", "service"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--models: Field required; see --help"),
        (["--models", "x", "--port", "http"], 2, "--port: Input should be a valid integer"),
        (["--models", "x", "--port", "70000"], 2, "--port: Input should be less than or equal"),
        (["--models", "x", "--host", ""], 2, "--host: String should have at least 1"),
        (["--models", "nowhere"], 1, "nowhere is not a directory"),
        (
            ["--models", ".", "--workers", "0"],
            2,
            "--workers: Input should be greater than or equal",
        ),
        (["--models", ".", "--host", "0.0.0.0"], 2, "keys are needed: make one with syncbn-keys"),
        (["--models", ".", "--host", "::"], 2, "or let everybody in with --no-auth"),
        (
            ["--models", ".", "--api-keys", "nowhere"],
            1,
            "cannot read the API keys nowhere: No such",
        ),
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


def test_bundles_none_of_which_can_be_loaded_are_an_error(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "models" / "one")
    (tmp_path / "models" / "one" / "model.safetensors").write_bytes(b"")
    result = run([*SERVE, "--models", "models", "--port", "0"], tmp_path)
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("syncbn-serve: models/one/model.safetensors has 0 bytes, but")
    assert "Traceback" not in result.stdout


def test_empty_directory_waits_for_a_model_and_serves_it(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with served(models, tmp_path / "log", "--poll-s", "0.1") as service:
        assert "holds no bundle that can be served" in service.log.read_text()
        assert service.ask("GET", "/v2/models").json() == {"models": []}
        write_small_bundle(models / "shapes" / "1")
        deadline = time.monotonic() + 60
        while service.ask("GET", "/v2/models/shapes/ready").status_code != 200:
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.05)


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
    with (
        served(models, tmp_path / "log", "--timeout-s", "1") as service,
        socket.create_connection(("127.0.0.1", service.port)) as stalled,
    ):
        head = b"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        stalled.sendall(head)
        stalled.settimeout(30)
        assert stalled.recv(100).startswith(b"HTTP/1.1 408 ")
        service.process.terminate()
        assert service.process.wait(30) in (0, -signal.SIGTERM)


def _pids(service: Service) -> set[int]:
    """Return the workers that answer."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    return {
        int(pid)
        for pid in children.read_text().split()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


@pytest.mark.long
def test_killed_worker_comes_back_and_the_others_serve_on(models: Path, tmp_path: Path) -> None:
    with served(models, tmp_path / "log", "--workers", "2") as service:
        deadline = time.monotonic() + 120

        def wait_for(fact: Callable[[], bool]) -> None:
            while not fact():
                assert time.monotonic() < deadline, service.log.read_text()
                time.sleep(0.1)

        def started() -> int:
            return service.log.read_text().count("Application startup complete")

        wait_for(lambda: started() == 2)
        before = _pids(service)
        assert len(before) == 2
        body = {
            "inputs": [
                {"name": "image", "shape": [1, 1, 4, 4], "datatype": "FP32", "data": [0.5] * 16}
            ]
        }
        infer = "/v2/models/shapes/infer"
        assert all(service.ask("POST", infer, json=body).is_success for _ in range(20))
        # What one worker is asked to do, all have done when it answers.
        assert service.ask("POST", "/v2/repository/models/shapes/unload").is_success
        assert {service.ask("POST", infer, json=body).status_code for _ in range(20)} == {404}
        assert service.ask("POST", "/v2/repository/models/shapes/load").is_success
        assert {service.ask("POST", infer, json=body).status_code for _ in range(20)} == {200}
        os.kill(min(before), signal.SIGKILL)
        answered = 0
        while started() < 3:
            assert time.monotonic() < deadline, service.log.read_text()
            # A connection that the killed one had accepted is lost; a new one finds another.
            try:
                assert service.ask("POST", infer, json=body).is_success
                answered += 1
            except httpx2.TransportError:
                assert answered < 2
        assert answered > 0
        after = _pids(service)
        assert len(after) == 2
        assert min(before) not in after
        stats = service.ask("GET", "/v2/models/shapes/stats").json()["model_stats"][0]
        assert stats["inference_count"] >= 40
        service.process.kill()
        service.process.wait(30)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in after))
