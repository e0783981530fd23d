import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from service.metrics import Metrics, Statistics

WORKER = """
import sys
from service.metrics import Metrics
metrics = Metrics()
model = metrics.model("shapes", "1")
metrics.model_loaded("shapes", "1", True)
metrics.http_request("/v2", "GET", 200, 0.5)
model.requests("ok", 3)
model.queue_changed(2)
model.batch_started([0.25, 0.5], 3)
model.batch_finished(0.125)
model.drift(0.5, {"bn": 0.25})
print("ready", flush=True)
sys.stdin.readline()
metrics.model_loaded("shapes", "1", False)
print("unloaded", flush=True)
sys.stdin.readline()
"""


def _values(text: str) -> dict[str, float]:
    """Return all samples of a text, by their name and labels."""
    parse = openmetrics if text.rstrip().endswith("# EOF") else parser
    families = parse.text_string_to_metric_families(text.rstrip() + "\n")
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())):
        sample.value
        for family in families
        for sample in family.samples
    }  # fmt: skip


def _rendered(metrics: Metrics) -> dict[str, float]:
    return _values(metrics.render("text/plain")[0].decode())


def test_everything_is_counted_under_its_labels() -> None:
    metrics = Metrics()
    metrics.http_request("/v2", "GET", 200, 0.5)
    metrics.http_request("/v2", "BREW", 405, 0.5)
    metrics.http_request("/v2", "STEAL", 405, 0.5)
    model = metrics.model("shapes", "1")
    assert metrics.model("shapes", "1") is model
    metrics.model_loaded("shapes", "1", True)
    metrics.load_finished("shapes", True)
    metrics.load_finished("shapes", False)
    model.requests("ok", 5)
    model.requests("refused")
    model.queue_changed(7)
    model.batch_started([0.25, 0.5], 5)
    model.batch_finished(0.125)
    model.drift(0.5, {"bn": 0.25, "unknown": None})
    values = _rendered(metrics)
    of_model = " model=shapes version=1"
    assert (
        values.items()
        >= {
            "syncbn_http_requests_total method=GET route=/v2 status=200": 1,
            "syncbn_http_requests_total method=OTHER route=/v2 status=405": 2,
            "syncbn_http_request_seconds_sum route=/v2": 1.5,
            "syncbn_model_requests_total model=shapes outcome=ok version=1": 1,
            "syncbn_model_requests_total model=shapes outcome=refused version=1": 1,
            f"syncbn_model_rows_total{of_model}": 5,
            f"syncbn_queue_rows{of_model}": 7,
            f"syncbn_queue_seconds_sum{of_model}": 0.75,
            f"syncbn_queue_seconds_count{of_model}": 2,
            f"syncbn_batch_rows_sum{of_model}": 5,
            f"syncbn_forward_seconds_sum{of_model}": 0.125,
            f"syncbn_model_loaded{of_model}": 1,
            "syncbn_model_loads_total model=shapes outcome=ok": 1,
            "syncbn_model_loads_total model=shapes outcome=failed": 1,
            f"syncbn_input_drift{of_model}": 0.5,
            "syncbn_layer_drift layer=bn model=shapes version=1": 0.25,
        }.items()
    )
    assert "process_open_fds" in values
    assert metrics.statistics("shapes", "1") == Statistics(
        requests={"ok": 1, "refused": 1},
        rows=5,
        batches=1,
        forward_seconds=0.125,
        queue_count=2,
        queue_seconds=0.75,
    )
    metrics.model_loaded("shapes", "1", False)
    values = _rendered(metrics)
    assert values[f"syncbn_model_loaded{of_model}"] == 0
    assert values[f"syncbn_queue_rows{of_model}"] == 0
    assert values[f"syncbn_model_rows_total{of_model}"] == 5
    assert not any("drift" in name for name in values)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=x", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.x", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1"),
    ],
)
def test_form_is_that_which_is_asked_for_if_it_is_known(accept: str, content_type: str) -> None:
    metrics = Metrics()
    metrics.http_request("/v2", "GET", 200, 0.5)
    body, said = metrics.render(accept)
    assert said.startswith(content_type)
    parse = openmetrics if "openmetrics" in said else parser
    names = {family.name for family in parse.text_string_to_metric_families(body.decode())}
    assert "syncbn_http_requests" in names
    assert not any(name.endswith("_created") for name in names)


def test_model_that_is_loaded_again_goes_on_where_it_was() -> None:
    metrics = Metrics()
    model = metrics.model("shapes", "1")
    model.drift(0.5, {"bn": 0.25})
    model.requests("ok", 2)
    metrics.model_loaded("shapes", "1", False)
    metrics.model_loaded("shapes", "1", True)
    model.drift(0.75, {"bn": None})
    model.requests("ok", 2)
    values = _rendered(metrics)
    assert values["syncbn_input_drift model=shapes version=1"] == 0.75
    assert not any(name.startswith("syncbn_layer_drift") for name in values)
    assert values["syncbn_model_rows_total model=shapes version=1"] == 4


def test_methods_that_clients_make_up_are_not_remembered() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.http_request("/v2", f"MADE{number}", 405, 0.5)
    assert len(metrics._of_http) == 0  # pyright: ignore[reportPrivateUsage] -- it would grow
    assert _rendered(metrics)["syncbn_http_requests_total method=OTHER route=/v2 status=405"] == 100


def test_workers_are_counted_together_and_the_dead_only_for_what_they_did(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers: list[subprocess.Popen[str]] = []
    ask = (
        "from service.metrics import Metrics; metrics = Metrics(); "
        "print(metrics.render('application/openmetrics-text; version=1.0.0')[0].decode()); "
        "print('#', metrics.statistics('shapes', '1').rows)"
    )

    def asked() -> str:
        command = [sys.executable, "-c", ask]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    try:
        for _ in range(2):
            command = [sys.executable, "-c", WORKER]
            worker = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            workers.append(worker)
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        text = asked()
        assert re.findall("^# (\\d+)$", text, re.MULTILINE) == ["6"]
        values = _values(text.rpartition("#")[0])
        of_model = " model=shapes version=1"
        assert values["syncbn_http_requests_total method=GET route=/v2 status=200"] == 2
        assert values[f"syncbn_model_rows_total{of_model}"] == 6
        assert values[f"syncbn_queue_rows{of_model}"] == 4
        assert values[f"syncbn_model_loaded{of_model}"] == 1
        assert values[f"syncbn_input_drift{of_model}"] == pytest.approx(0.5)
        workers[0].kill()
        workers[0].wait(30)
        values = _values(asked().rpartition("#")[0])
        assert values[f"syncbn_queue_rows{of_model}"] == 2
        assert values[f"syncbn_model_rows_total{of_model}"] == 6
        assert workers[1].stdin is not None
        assert workers[1].stdout is not None
        workers[1].stdin.write("unload\n")
        workers[1].stdin.flush()
        assert workers[1].stdout.readline() == "unloaded\n"
        values = _values(asked().rpartition("#")[0])
        for name in ("syncbn_model_loaded", "syncbn_queue_rows", "syncbn_input_drift"):
            assert values[f"{name}{of_model}"] == 0
        assert values["syncbn_layer_drift layer=bn model=shapes version=1"] == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate(timeout=30)
