"""The container files against what they name: there is no container engine where tests run."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import create_app
from service.auth import read_keys
from service.metrics import Metrics
from service.settings import Settings
from syncbn.train.config import compose_config
from tests.support.processes import REPOSITORY, run

COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
SCRIPTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
MONITORING = REPOSITORY / "service" / "monitoring"


def _instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def test_compose_file_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = str(REPOSITORY / "docker-compose.yml")
    result = subprocess.run([*command, file], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_program_and_variable_of_ours_exists() -> None:
    text = "\n".join((*_strings(COMPOSE["services"]), DOCKERFILE))
    programs = set(re.findall(r"\bsyncbn-[a-z]+\b", text))
    assert programs >= {"syncbn-serve", "syncbn-dispatch", "syncbn-train", "syncbn-keys"}
    assert programs <= set(SCRIPTS)
    variables = {
        name
        for service in COMPOSE["services"].values()
        for name in service.get("environment", {})
        if name.startswith("SYNCBN_")
    } | set(re.findall(r"\bSYNCBN_[A-Z_]+(?==)", DOCKERFILE))
    assert variables >= {"SYNCBN_MODELS", "SYNCBN_API_KEYS", "SYNCBN_NO_AUTH"}
    fields = {f"SYNCBN_{name.upper()}" for name in Settings.model_fields}
    assert variables <= fields


def test_service_of_the_compose_file_has_settings_that_are_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in COMPOSE["services"]["service"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    settings = Settings()  # pyright: ignore[reportCallIssue] -- the environment has the rest
    assert settings.no_auth
    assert str(settings.api_keys) == "/keys/api-keys"
    assert settings.allowed_hosts == ["127.0.0.1", "localhost"]


def test_dispatcher_of_the_compose_file_has_the_directories_of_the_service() -> None:
    service, dispatch = (COMPOSE["services"][name] for name in ("service", "dispatch"))
    program, *arguments = dispatch["command"]
    assert program in SCRIPTS
    environment = service["environment"]
    assert arguments == [environment["SYNCBN_JOBS"], "--models", environment["SYNCBN_MODELS"]]
    assert environment["SYNCBN_DISPATCHER"] == "false"  # as there is one for all
    assert {"models:/models", "jobs:/jobs"} <= set(dispatch["volumes"])
    assert "jobs:/jobs" in service["volumes"]
    assert " /jobs " in next(line for line in _instructions("RUN") if "--owner syncbn" in line)


def test_every_training_command_is_a_configuration_that_there_is() -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    commands = re.findall(r"syncbn-train((?: [a-z_.]+=\S+)+)", text)
    assert len(commands) == 3
    for command in commands:
        assert compose_config(shlex.split(command)).publish == "/models"


def test_training_starts_only_where_there_is_no_model(tmp_path: Path) -> None:
    *shell, line = COMPOSE["services"]["train"]["command"]
    assert shell == ["sh", "-c"]
    line = line.replace("/models/", f"{tmp_path}/").replace("exec syncbn-train", "exec echo train")
    model = tmp_path / "digits-cnn"
    for name in (".publish.lock", ".1.half/bundle.json"):  # what a publication begins with
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("")
        assert run([*shell, line], tmp_path).stdout.startswith("train publish=")
    (model / ".1.half").rename(model / "1")
    result = run([*shell, line], tmp_path)
    assert (result.returncode, result.stdout) == (0, "")


def test_key_of_prometheus_is_made_once_and_is_one_of_the_services_keys(tmp_path: Path) -> None:
    *shell, line = COMPOSE["services"]["keys"]["command"]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made: set[str] = set()
    for _ in range(2):
        result = run([*shell, line.replace("/keys/", f"{tmp_path}/")], tmp_path, PATH=programs)
        assert result.returncode == 0, result.stdout
        made.add((tmp_path / "prometheus").read_text())
    (key,) = made
    assert key.startswith("syncbn_")
    (record,) = read_keys(tmp_path / "api-keys")
    assert (record.scopes, record.label) == (("infer", "jobs:read"), "prometheus")


def test_what_is_named_inside_a_container_is_mounted_there() -> None:
    services = COMPOSE["services"]
    mounts = {
        name: {volume.split(":")[1] for volume in service.get("volumes", [])}
        for name, service in services.items()
    }
    config = next(each for each in services["prometheus"]["command"] if "config.file" in each)
    assert config.partition("=")[2] in mounts["prometheus"]
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    key = job["authorization"]["credentials_file"]
    assert services["keys"]["command"][-1].endswith(f"> {key}")
    environment = services["grafana"]["environment"]
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounts["grafana"]
    for file in (key, services["service"]["environment"]["SYNCBN_API_KEYS"]):
        assert {"/keys"} <= mounts["keys"] & mounts["prometheus"] & mounts["service"]
        assert str(Path(file).parent) == "/keys"
    assert "/models" in mounts["service"] & mounts["train"]


def test_every_file_that_is_mounted_exists_and_every_volume_is_declared() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (REPOSITORY / source).is_file()
            else:
                assert source in COMPOSE["volumes"]


def test_nothing_is_open_to_other_machines() -> None:
    ports = [port for each in COMPOSE["services"].values() for port in each.get("ports", [])]
    assert len(ports) >= 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_of_others_have_a_version() -> None:
    images = [each["image"] for each in COMPOSE["services"].values()]
    images += [name for name in _instructions("FROM") if ":" in name]
    ours = COMPOSE["services"]["service"]["image"]
    assert all(re.search(r":v?\d+\.\d+", image) for image in images if image != ours)


def test_image_runs_as_another_user_than_root_and_tells_its_health() -> None:
    assert _instructions("USER")[-1] == "10001:10001"
    assert DOCKERFILE.index("\nUSER") > DOCKERFILE.rindex("\nRUN")
    (health,) = re.findall(r"HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE)
    assert "/v2/health/ready" in json.loads(health)[-1]
    compile(json.loads(health)[-1], "health check", "exec")
    assert not _instructions("ADD")


def test_everything_that_is_copied_exists_and_is_not_ignored() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    ignored = [line for line in lines if line[0] not in "!#" and line != "*"]
    copied: set[str] = set()
    for arguments in _instructions("COPY"):
        if not arguments.startswith("--from"):
            copied |= set(arguments.split()[:-1])
    assert {"pyproject.toml", "conf", "syncbn", "service"} <= copied
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), source
        assert not any(fnmatch(source, pattern) for pattern in ignored), source


def test_wheel_has_all_that_its_build_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    asked = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]}
    asked |= set(project["project"]["license-files"])
    asked |= {wheel["hooks"]["custom"]["path"], project["tool"]["hatch"]["version"]["path"]}
    stage = DOCKERFILE.partition("\nFROM base AS wheel\n")[2].partition("\nFROM ")[0]
    lines = re.findall(r"^COPY (.*)$", stage, re.MULTILINE)
    copied = {Path(source) for line in lines for source in line.split()[:-1]}
    for name in asked:
        assert copied & {Path(name), *Path(name).parents}, name


def test_prometheus_asks_the_service_and_grafana_asks_prometheus() -> None:
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:8000"]}]
    assert job["metrics_path"] == "/metrics"
    assert COMPOSE["services"]["service"]["environment"]["SYNCBN_PORT"] == "8000"
    (source,) = yaml.safe_load((MONITORING / "datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = (MONITORING / "dashboard.json").read_text()
    assert set(re.findall(r'"datasource": \{[^}]*"uid": "(\w+)"\}', dashboard)) == {source["uid"]}
    numbers = [panel["id"] for panel in json.loads(dashboard)["panels"]]
    assert len(set(numbers)) == len(numbers) > 10
    (provider,) = yaml.safe_load((MONITORING / "dashboards.yml").read_text())["providers"]
    home = COMPOSE["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert home.startswith(provider["options"]["path"])


def test_dashboard_shows_metrics_that_there_are_with_labels_that_they_have() -> None:
    metrics = Metrics()
    metrics.http_request("/v2", "GET", 200, 0.1)
    metrics.model_loaded("m", "1", True)
    metrics.load_finished("m", True)
    model = metrics.model("m", "1")
    model.requests("ok", 1)
    model.drift(0.0, {"bn": 0.0})
    text = metrics.render("text/plain")[0].decode()
    there = set(re.findall(r"^(syncbn_\w+)[{ ]", text, re.MULTILINE))
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"instance", "job"}
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [each for each in _strings(dashboard) if "syncbn_" in each]
    assert len(queries) > 15
    for query in queries:
        assert set(re.findall(r"\bsyncbn_\w+", query)) <= there, query
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)) <= labels, query
        for group in re.findall(r"\bby \(([^)]*)\)", query):
            assert set(re.split(r",\s*", group)) <= labels, query


def test_dashboard_asks_for_routes_that_there_are(tmp_path: Path) -> None:
    routes = create_app(Settings(models=tmp_path)).openapi()["paths"]
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    asked = {
        part
        for query in _strings(dashboard)
        for pattern in re.findall(r'\broute[=!]~"([^"]*)"', query)
        for part in pattern.split("|")
    }
    assert len(asked) >= 4
    for pattern in asked:  # of the whole route, as Prometheus does
        assert any(re.fullmatch(pattern, route) for route in routes), pattern
