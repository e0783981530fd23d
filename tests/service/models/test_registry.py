import asyncio
import json
import logging
import os
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import LoadError, ModelNotFoundError
from service.models import desired_state
from service.models.registry import IndexEntry, Registry
from syncbn.errors import BundleError

LONG_S = 60.0


class Model:
    """A model that only says what it was loaded of."""

    def __init__(self, content: str, version: str) -> None:
        self.content = content
        self.version = version
        self.started = self.drained = False

    def start(self) -> None:
        asyncio.get_running_loop()
        self.started = True

    async def drain(self) -> None:
        await asyncio.sleep(0)
        self.drained = True


class Loader:
    """Loads fake bundles, and counts; what is called bad cannot be loaded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.models: list[Model] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.running = 0

    def __call__(self, path: Path, version: str) -> Model:
        self.running += 1
        assert self.running == 1
        try:
            assert self.go_on.wait(LONG_S)
            content = (path / "model.safetensors").read_text()
            self.calls.append(content)
            if content.startswith("bad"):
                raise BundleError(f"{path}: {content}")
            if content.startswith("bug"):
                raise RuntimeError("a bug")
            self.models.append(Model(content, version))
            return self.models[-1]
        finally:
            self.running -= 1


class Records:
    def __init__(self) -> None:
        self.loaded: dict[tuple[str, str], bool] = {}
        self.loads: list[tuple[str, bool]] = []

    def model_loaded(self, name: str, version: str, loaded: bool) -> None:
        self.loaded[name, version] = loaded

    def load_finished(self, name: str, ok: bool) -> None:
        self.loads.append((name, ok))


def _write(path: Path, name: str, content: str = "weights") -> Path:
    """Write a fake bundle that appears as a whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.mkdir(parents=True)
    (temporary / "bundle.json").write_text(json.dumps({"name": name}))
    (temporary / "model.safetensors").write_text(content)
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    return path


def _run(
    directory: Path,
    work: Callable[["Registry[Model]", Loader], Awaitable[None]],
    *,
    versions: int = 1,
    poll_s: float = 0.01,
    strict: bool = True,
    records: Records | None = None,
) -> None:
    async def run() -> None:
        load = Loader()
        registry = Registry(
            directory,
            load,
            versions=versions,
            poll_s=poll_s,
            observer=records or Records(),
            desired_state=desired_state.DesiredState(None),
        )
        async with asyncio.timeout(LONG_S):
            await registry.open(strict=strict)
            await work(registry, load)
            load.go_on.set()
            await registry.close()
        assert all(model.drained for model in load.models)
        assert registry.names() == []

    asyncio.run(run())


async def _until(fact: Callable[[], bool]) -> None:
    while not fact():
        await asyncio.sleep(0.005)


def _contents(registry: "Registry[Model]") -> dict[str, list[str]]:
    return {
        name: [registry.get(name, version).content for version in registry.versions_of(name)]
        for name in registry.names()
    }


def _entry(name: str, version: str, state: Any = "READY", reason: str = "") -> IndexEntry:
    return IndexEntry(name, version, state, reason)


@pytest.mark.parametrize(
    ("paths", "index"),
    [
        (["."], [_entry("m", "1")]),
        (["any"], [_entry("m", "1")]),
        (["7"], [_entry("m", "7")]),
        (["any/3"], [_entry("m", "3")]),
        ([".hidden", "any/.3", "any/new", "any/007", "any/0", "any/3/4"], []),
    ],
)
def test_bundles_are_found_in_all_forms_of_the_directory(
    tmp_path: Path, paths: list[str], index: list[IndexEntry]
) -> None:
    for path in paths:
        if path == ".":
            (tmp_path / "bundle.json").write_text('{"name": "m"}')
            (tmp_path / "model.safetensors").write_text("weights")
        else:
            _write(tmp_path / path, "m")

    async def work(registry: Registry[Model], load: Loader) -> None:
        assert registry.index() == index
        if index:
            assert registry.get("m") is registry.get("m", index[0].version)
            assert registry.get("m").started

    _run(tmp_path, work)


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a directory; name a bundle or a directory of"):
        _run(tmp_path / "nowhere", lambda registry, load: asyncio.sleep(0))


def test_unknown_models_and_versions_are_told(tmp_path: Path) -> None:
    _write(tmp_path / "a", "shapes")
    _write(tmp_path / "b", "broken", "bad")

    async def work(registry: Registry[Model], load: Loader) -> None:
        for name, version, message in (
            ("cars", None, "no model 'cars'; loaded: shapes"),
            ("shapes", "2", "model 'shapes' has no version '2'; loaded: 1"),
            ("broken", None, "model 'broken' is not loaded: .*b: bad"),
        ):
            with pytest.raises(ModelNotFoundError, match=message):
                registry.get(name, version)

    _run(tmp_path, work)


def test_nothing_that_can_be_loaded_is_an_error_if_strict(tmp_path: Path) -> None:
    _write(tmp_path / "a", "a", "bad one")
    _write(tmp_path / "b", "b", "bad two")
    with pytest.raises(BundleError, match=r"a: bad one; .*b: bad two"):
        _run(tmp_path, lambda registry, load: asyncio.sleep(0))

    async def work(registry: Registry[Model], load: Loader) -> None:
        assert [entry.state for entry in registry.index()] == ["UNAVAILABLE"] * 2

    _run(tmp_path, work, strict=False)


def test_new_version_is_loaded_beside_the_old_and_takes_its_place(tmp_path: Path) -> None:
    _write(tmp_path / "m" / "1", "m", "first")
    records = Records()

    async def work(registry: Registry[Model], load: Loader) -> None:
        old = registry.get("m")
        load.go_on.clear()
        _write(tmp_path / "m" / "2", "m", "second")
        await _until(lambda: any(entry.state == "LOADING" for entry in registry.index()))
        assert registry.get("m") is old
        load.go_on.set()
        await _until(lambda: registry.get("m") is not old)
        assert _contents(registry) == {"m": ["second"]}
        await _until(lambda: old.drained)
        assert records.loaded == {("m", "1"): False, ("m", "2"): True}
        assert registry.index() == [
            _entry("m", "1", "UNAVAILABLE", "newer versions are served"),
            _entry("m", "2"),
        ]
        assert registry.index(ready=True) == [_entry("m", "2")]

    _run(tmp_path, work, records=records)


def test_as_many_of_the_newest_versions_are_served_as_asked_for(tmp_path: Path) -> None:
    for number in (2, 9, 10):
        _write(tmp_path / "m" / str(number), "m", str(number))

    async def work(registry: Registry[Model], load: Loader) -> None:
        assert registry.versions_of("m") == ["9", "10"]
        assert registry.get("m").content == "10"
        _write(tmp_path / "m" / "11", "m", "11")
        await _until(lambda: registry.versions_of("m") == ["10", "11"])
        shutil.rmtree(tmp_path / "m" / "11")
        await _until(lambda: registry.versions_of("m") == ["9", "10"])

    _run(tmp_path, work, versions=2)


@pytest.mark.parametrize("content", ["bad weights", "bug"])
def test_broken_version_leaves_the_old_one_serving(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "m" / "1", "m", "first")
    records = Records()

    async def work(registry: Registry[Model], load: Loader) -> None:
        old = registry.get("m")
        _write(tmp_path / "m" / "2", "m", content)
        await _until(lambda: len(load.calls) == 2)
        await asyncio.sleep(0.1)
        assert load.calls == ["first", content]  # it is not tried again
        assert registry.get("m") is old
        assert registry.index()[1].state == "UNAVAILABLE"
        assert "a bug" in registry.index()[1].reason or "bad weights" in registry.index()[1].reason
        assert records.loads == [("m", True), ("m", False)]
        assert "model m version 2 is not served" in caplog.text
        _write(tmp_path / "m" / "2", "m", "mended")
        await _until(lambda: registry.get("m").content == "mended")

    _run(tmp_path, work, records=records)


def test_bundle_replaced_in_place_is_loaded_again_unless_it_is_broken(tmp_path: Path) -> None:
    _write(tmp_path / "m", "m", "first")

    async def work(registry: Registry[Model], load: Loader) -> None:
        old = registry.get("m")
        _write(tmp_path / "m", "m", "second")
        await _until(lambda: registry.get("m").content == "second")
        assert old.drained
        _write(tmp_path / "m", "m", "bad")
        await _until(lambda: len(load.calls) == 3)
        await asyncio.sleep(0.05)
        assert registry.get("m").content == "second"
        assert registry.index()[0].reason.startswith("its successor: ")
        assert len(load.calls) == 3

    _run(tmp_path, work)


def test_removed_bundle_is_dropped_but_not_for_a_directory_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "models"
    _write(models / "a", "a")
    _write(models / "b", "b")

    async def work(registry: Registry[Model], load: Loader) -> None:
        shutil.rmtree(models / "a")
        await _until(lambda: registry.names() == ["b"])
        models.rename(tmp_path / "away")
        await _until(lambda: "cannot be read, so all stays" in caplog.text)
        await asyncio.sleep(0.05)
        assert registry.names() == ["b"]
        assert caplog.text.count("cannot be read, so all stays") == 1
        (tmp_path / "away").rename(models)
        _write(models / "c", "c")
        await _until(lambda: registry.names() == ["b", "c"])

    _run(models, work)


def test_second_bundle_of_a_name_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "b", "m", "first")

    async def work(registry: Registry[Model], load: Loader) -> None:
        _write(tmp_path / "a", "m", "second")
        await _until(lambda: len(registry.index()) == 2)
        ready, refused = registry.index()
        assert ready == _entry("m", "1")
        assert "a is called like" in refused.reason
        assert _contents(registry) == {"m": ["first"]}
        shutil.rmtree(tmp_path / "b")
        await _until(lambda: _contents(registry) == {"m": ["second"]})

    _run(tmp_path, work)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"name": 7}', "[" * 100_000])
def test_manifest_without_a_name_is_shown_by_its_place(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "good").mkdir()
    _write(tmp_path / "good", "good")
    _write(tmp_path / "odd", "odd", "bad")
    (tmp_path / "odd" / "bundle.json").write_text(manifest)

    async def work(registry: Registry[Model], load: Loader) -> None:
        assert [(entry.name, entry.state) for entry in registry.index()] == [
            ("good", "READY"),
            ("odd", "UNAVAILABLE"),
        ]

    _run(tmp_path, work)


def test_model_is_unloaded_and_loaded_by_name(tmp_path: Path) -> None:
    _write(tmp_path / "m" / "1", "m", "first")

    async def work(registry: Registry[Model], load: Loader) -> None:
        old = registry.get("m")
        await registry.unload("m")
        await registry.unload("m")
        with pytest.raises(ModelNotFoundError, match="model 'm' is not loaded: it was unloaded"):
            registry.get("m")
        await _until(lambda: old.drained)
        _write(tmp_path / "m" / "2", "m", "second")
        await asyncio.sleep(0.1)
        assert registry.names() == []
        await registry.load("m")
        assert registry.get("m").content == "second"
        for work in (registry.load, registry.unload):
            with pytest.raises(ModelNotFoundError, match="no model 'cars'"):
                await work("cars")

    _run(tmp_path, work)


def test_loading_tries_a_broken_bundle_again_and_says_why_it_fails(tmp_path: Path) -> None:
    _write(tmp_path / "m", "m", "bad weights")

    async def work(registry: Registry[Model], load: Loader) -> None:
        with pytest.raises(LoadError, match="m: bad weights"):
            await registry.load("m")
        assert len(load.calls) == 2
        (tmp_path / "m" / "model.safetensors").write_text("mended")
        await registry.load("m")
        assert registry.get("m").content == "mended"

    _run(tmp_path, work, strict=False)


def test_client_that_goes_away_while_a_model_is_loaded_harms_nothing(tmp_path: Path) -> None:
    _write(tmp_path / "m", "m")

    async def work(registry: Registry[Model], load: Loader) -> None:
        await registry.unload("m")
        load.go_on.clear()
        task = asyncio.create_task(registry.load("m"))
        await _until(lambda: load.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        load.go_on.set()
        await _until(lambda: registry.names() == ["m"])

    _run(tmp_path, work)


def test_looking_goes_on_after_a_failure_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "a", "a")

    async def work(registry: Registry[Model], load: Loader) -> None:
        with monkeypatch.context() as context:
            context.setattr("service.models.registry._bundles", None)
            await _until(lambda: "could not be looked at" in caplog.text)
        _write(tmp_path / "b", "b")
        await _until(lambda: registry.names() == ["a", "b"])

    caplog.set_level(logging.ERROR)
    _run(tmp_path, work)


# Several processes


def _two(
    directory: Path,
    state_dir: Path,
    work: Callable[["Registry[Model]", "Registry[Model]"], Awaitable[None]],
) -> None:
    async def run() -> None:
        state_dir.mkdir()
        registries: list[Registry[Model]] = []
        async with asyncio.timeout(LONG_S):
            # Both pids are of processes that live.
            for pid in (os.getpid(), os.getppid()):
                registry = Registry(
                    directory,
                    Loader(),
                    versions=1,
                    poll_s=60,
                    observer=Records(),
                    desired_state=desired_state.DesiredState(state_dir, pid),
                )
                await registry.open(strict=False)
                registries.append(registry)
            await work(*registries)
            for registry in registries:
                await registry.close()

    asyncio.run(run())


def test_what_one_process_is_asked_for_all_have_done(tmp_path: Path) -> None:
    _write(tmp_path / "models" / "m", "m")

    async def work(one: Registry[Model], other: Registry[Model]) -> None:
        await one.unload("m")
        assert one.names() == other.names() == []
        await other.load("m")
        assert one.names() == other.names() == ["m"]
        _write(tmp_path / "models" / "m", "m", "bad weights")
        await one.unload("m")
        with pytest.raises(LoadError, match="bad weights"):
            await other.load("m")

    _two(tmp_path / "models", tmp_path / "state", work)


def test_process_that_starts_later_knows_what_was_asked_for(tmp_path: Path) -> None:
    _write(tmp_path / "models" / "m", "m")
    state_dir = tmp_path / "state"

    async def work(one: Registry[Model], other: Registry[Model]) -> None:
        await one.unload("m")
        late = Registry(
            tmp_path / "models",
            Loader(),
            versions=1,
            poll_s=60,
            observer=Records(),
            desired_state=desired_state.DesiredState(state_dir),
        )
        await late.open()
        assert late.names() == []
        await late.close()

    _two(tmp_path / "models", state_dir, work)


def test_dead_and_slow_processes_are_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desired_state, "_TIMEOUT_S", 0.2)
    # Of processes, one that is dead, and one that lives and never answers.
    (tmp_path / "worker-4194999").write_text('{"generation": 0, "failures": {}}')
    (tmp_path / "worker-1").write_text('{"generation": 0, "failures": {}}')
    mine = desired_state.DesiredState(tmp_path)
    wishes = mine.write(lambda wishes: wishes.to_unload("m"))
    mine.acknowledge(wishes.generation, {})
    assert asyncio.run(mine.wait_for_all(wishes.generation)) == {}
    assert not (tmp_path / "worker-4194999").exists()
    assert (tmp_path / "worker-1").exists()
    assert desired_state.DesiredState(tmp_path).read().unloaded == ("m",)
