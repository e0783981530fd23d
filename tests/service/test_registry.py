import json
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from service.app import create_app
from service.errors import ModelNotFoundError
from service.registry import load_registry
from service.settings import Settings
from syncbn.errors import BundleError
from tests.service.conftest import write_small_bundle


def test_directory_of_bundles_is_loaded_under_their_names(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "b", "beta")
    write_small_bundle(tmp_path / "a", "alpha")
    (tmp_path / "notes").mkdir()
    write_small_bundle(tmp_path / ".a.being-written", "alpha")
    registry = load_registry(tmp_path)
    assert registry.names() == ["alpha", "beta"]
    assert registry.get("beta").manifest.name == "beta"
    with pytest.raises(ModelNotFoundError, match="no model 'gamma'; loaded: alpha, beta"):
        registry.get("gamma")


def test_a_bundle_alone_is_loaded(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "b", "beta")
    assert load_registry(tmp_path / "b").names() == ["beta"]


def test_directory_without_bundles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no bundle"):
        load_registry(tmp_path)
    with pytest.raises(BundleError, match="is not a directory"):
        load_registry(tmp_path / "nothing")


def test_equal_names_are_refused(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        write_small_bundle(tmp_path / directory, "same")
    with pytest.raises(BundleError, match=r"two bundles in .* are called 'same'"):
        load_registry(tmp_path)


def test_damaged_bundle_is_refused_by_its_path(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "a", "alpha")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"a/model.safetensors has 0 bytes"):
        load_registry(tmp_path)


def test_code_that_a_bundle_names_is_run_only_where_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_bundle(tmp_path / "a", "alpha")
    manifest = json.loads((tmp_path / "a" / "bundle.json").read_text())
    manifest["architecture"]["name"] = "users_of_registry:net"
    (tmp_path / "a" / "bundle.json").write_text(json.dumps(manifest))
    (tmp_path / "users_of_registry.py").write_text("from syncbn.models import cnn as net")
    monkeypatch.syspath_prepend(tmp_path)
    command_line = ["--models", str(tmp_path)]
    with pytest.raises(BundleError, match=r"import path, which is refused .* \(--allow-imports\)"):
        create_app(CliApp.run(Settings, command_line))
    create_app(CliApp.run(Settings, [*command_line, "--allow-imports"]))
    assert load_registry(tmp_path, allow_imports=True).names() == ["alpha"]
