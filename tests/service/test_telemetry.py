import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.serving import served


@pytest.fixture
def collector() -> Generator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield the address of what takes traces, and what it was sent."""
    sent: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join(30)


def test_requests_are_traced(
    models: Path,
    tmp_path: Path,
    collector: tuple[str, list[tuple[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, sent = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with served(models, tmp_path / "log", "--telemetry") as service:
        assert service.ask("GET", "/v2/models/shapes").is_success
        body = {"name": "image", "shape": [1, 1, 4, 4], "datatype": "FP32", "data": [0.5] * 16}
        infer = "/v2/models/shapes/infer"
        assert service.ask("POST", infer, json={"inputs": [body]}).is_success
    # What was not sent yet is sent when the service ends.
    assert {path for path, _ in sent} == {"/v1/traces"}
    spans = b"".join(body for _, body in sent)
    for name in (b"syncbn", b"GET /v2/models/{name}", b"POST /v2/models/{name}/infer"):
        assert name in spans


def test_missing_extra_is_explained(models: Path, tmp_path: Path) -> None:
    program = (
        "import sys, importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name: None if name == 'opentelemetry.sdk' else find(name); "
        f"sys.argv[1:] = ['--models', {str(models)!r}, '--port', '0', '--telemetry']; "
        "import service.__main__ as m; m.main()"
    )
    result = run([sys.executable, "-c", program], tmp_path)
    assert result.returncode == 1
    assert (
        "syncbn-serve: --telemetry needs what pip install 'syncbn[telemetry]' installs"
        in result.stdout
    )
