"""Which models are served: what is in their directory, as it changes, and what was asked for."""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from service.errors import LoadError, ModelNotFoundError
from service.models.desired_state import DesiredState, Wishes
from syncbn.bundle import MANIFEST_FILE, MANIFEST_LIMIT_BYTES, WEIGHTS_FILE
from syncbn.errors import BundleError

log = logging.getLogger(__name__)

State = Literal["READY", "LOADING", "UNAVAILABLE"]
Signature = tuple[tuple[int, int, int] | None, ...]
_VERSION = re.compile("[1-9][0-9]{0,17}")
_CONTROL_POLL_S = 0.2


class Loaded(Protocol):
    """A model that was loaded."""

    @property
    def version(self) -> str:
        """Under which it is served."""
        ...

    def start(self) -> None:
        """Begin to answer, on the running event loop; called before anybody can ask."""

    async def drain(self) -> None:
        """Answer what is under way, within a deadline of its own, and end."""


T = TypeVar("T", bound=Loaded)


class Observer(Protocol):
    """What is told of models that come and go."""

    def model_loaded(self, name: str, version: str, loaded: bool) -> None:
        """A model is served from now on, or is not any more."""

    def load_finished(self, name: str, ok: bool) -> None:
        """An attempt to load a model succeeded or failed."""


@dataclass(frozen=True)
class IndexEntry:
    """A bundle, and whether it is served; `reason` says why not."""

    name: str
    version: str
    state: State
    reason: str


@dataclass(frozen=True)
class _Found:
    """A bundle in the directory: where, and what changes when it does."""

    path: Path
    signature: Signature


@dataclass(frozen=True)
class _Served(Generic[T]):
    model: T
    found: _Found


Key = tuple[str, str]


class Registry(Generic[T]):
    """The models of a directory, kept up to date with it.

    The directory is a bundle, or holds bundles, or directories of them that are named by their
    version, a positive number; without such a name, a version is 1. A model's name is the one in
    its manifest. Names that begin with a dot are passed over: these are bundles being written.

    A new version is loaded beside the old, which is dropped once the new one answers; one that
    cannot be loaded is not tried again until its files change, and the old goes on answering.

    Args:
        directory: of the bundles.
        load: returns the model of a bundle, for a path and a version; called in a thread, one call
            at a time; may raise anything.
        versions: how many of a model's newest are served.
        poll_s: how often to look at the directory.
        observer: told of models that come and go.
        desired_state: what was asked for by API, of all processes that serve the directory.
    """

    def __init__(
        self,
        directory: Path,
        load: Callable[[Path, str], T],
        *,
        versions: int,
        poll_s: float,
        observer: Observer,
        desired_state: DesiredState,
    ) -> None:
        self._directory = directory
        self._load_bundle = load
        self._versions = versions
        self._poll_s = poll_s
        self._observer = observer
        self._desired_state = desired_state
        self._wishes = Wishes()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._lock = asyncio.Lock()
        self._served: dict[Key, _Served[T]] = {}
        self._by_name: dict[str, dict[str, T]] = {}  # the newest version first
        self._found: dict[Key, _Found] = {}
        self._refused: dict[Key, tuple[Signature, str]] = {}
        self._duplicates: list[tuple[Key, str]] = []
        self._loading: Key | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._listed = True

    @property
    def is_open(self) -> bool:
        """Whether it looks for changes."""
        return self._poller is not None

    async def open(self, *, strict: bool = True) -> None:
        """Load what is there, and look for changes from now on.

        Args:
            strict: whether to raise where there are bundles and none of them can be loaded.

        Raises:
            BundleError: the directory is none, or, with `strict`, as above.
        """
        if not self._directory.is_dir():
            raise BundleError(
                f"{self._directory} is not a directory; name a bundle or a directory of them"
            )
        self._wishes = self._desired_state.read()
        await self._update()
        self._desired_state.acknowledge(self._wishes.generation, {})
        if not self._served:
            if strict and self._refused:
                raise BundleError("; ".join(reason for _, reason in self._refused.values()))
            log.warning(
                "%s holds no bundle that can be served; one that is published there is served by "
                "itself",
                self._directory,
            )
        self._poller = asyncio.create_task(self._poll(), name="registry")

    async def close(self) -> None:
        """Stop looking, and let every model answer what it was asked."""
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
            self._poller = None
        async with self._lock:
            for key in list(self._served):
                self._drop(key)
            await asyncio.gather(*self._tasks)
        self._desired_state.leave()
        self._thread.shutdown(wait=False)

    def get(self, name: str, version: str | None = None) -> T:
        """Return a model.

        Args:
            name: of the model.
            version: None: the newest that is served.

        Raises:
            ModelNotFoundError: it is not served.
        """
        versions = self._by_name.get(name)
        if versions is not None:
            if version is None:
                return next(iter(versions.values()))
            if version in versions:
                return versions[version]
            raise ModelNotFoundError(
                f"model {name!r} has no version {version!r}; loaded: {', '.join(versions)}"
            )
        reasons = [entry.reason for entry in self.index() if entry.name == name]
        if reasons:
            raise ModelNotFoundError(f"model {name!r} is not loaded: {reasons[0]}")
        raise ModelNotFoundError(f"no model {name!r}; loaded: {', '.join(self.names()) or 'none'}")

    def names(self) -> list[str]:
        """Return the names of all models that are served, sorted."""
        return sorted(self._by_name)

    def versions_of(self, name: str) -> list[str]:
        """Return a model's versions that are served, the oldest first."""
        return list(reversed(self._by_name.get(name, {})))

    def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Return every bundle in the directory, sorted.

        Args:
            ready: only those that are served.
        """
        entries = [self._entry(key) for key in {*self._found, *self._served}]
        entries += [
            IndexEntry(*key, state="UNAVAILABLE", reason=reason) for key, reason in self._duplicates
        ]
        if ready:
            entries = [entry for entry in entries if entry.state == "READY"]
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version), entry.reason))

    def _entry(self, key: Key) -> IndexEntry:
        refused = self._refused.get(key)
        state: State = "UNAVAILABLE"
        if key in self._served:
            state, reason = "READY", "" if refused is None else f"its successor: {refused[1]}"
        elif key == self._loading:
            state, reason = "LOADING", ""
        elif refused is not None:
            reason = refused[1]
        elif key[0] in self._wishes.unloaded:
            reason = "it was unloaded"
        else:
            reason = "newer versions are served"
        return IndexEntry(*key, state=state, reason=reason)

    async def load(self, name: str) -> None:
        """Load a model that was unloaded, or could not be loaded, in all processes.

        Raises:
            ModelNotFoundError: there is no bundle of that name.
            LoadError: it cannot be loaded.
        """
        await self._refresh()
        if all(key[0] != name for key in self._found):
            raise ModelNotFoundError(f"there is no model {name!r} in the models directory")
        await self._ask(lambda wishes: wishes.to_load(name), name)

    async def unload(self, name: str) -> None:
        """Stop serving a model, and its new versions too, in all processes, until it is loaded.

        Raises:
            ModelNotFoundError: there is no model of that name.
        """
        await self._refresh()
        if all(key[0] != name for key in self.keys()):
            raise ModelNotFoundError(f"no model {name!r}; loaded: {', '.join(self.names())}")
        await self._ask(lambda wishes: wishes.to_unload(name), name)

    def keys(self) -> set[Key]:
        """Return name and version of every bundle that is in the directory or served."""
        return {*self._found, *self._served}

    async def _ask(self, change: Callable[[Wishes], Wishes], name: str) -> None:
        """Have a wish fulfilled here and in the other processes."""
        wishes = await asyncio.to_thread(self._desired_state.write, change)
        # Of its own, so that a client that goes away leaves nothing half done.
        await asyncio.shield(self._begin(self._follow(wishes)))
        failures = await self._desired_state.wait_for_all(wishes.generation)
        if name in failures:
            raise LoadError(failures[name])

    async def _follow(self, wishes: Wishes) -> None:
        """Do what is wished for, and say so."""
        async with self._lock:
            if wishes.generation <= self._wishes.generation:
                return
            again = {
                name
                for name, generation in wishes.retry.items()
                if generation > self._wishes.generation
            }
            self._wishes = wishes
            self._refused = {
                key: value for key, value in self._refused.items() if key[0] not in again
            }
            await self._update_locked()
            failures = {
                name: reasons[-1]
                for name in again
                if name not in self._by_name
                and (reasons := [why for key, (_, why) in self._refused.items() if key[0] == name])
            }
            self._desired_state.acknowledge(wishes.generation, failures)

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        look_s = loop.time() + self._poll_s
        while True:
            pause_s = look_s - loop.time()
            if self._desired_state.is_shared:
                pause_s = min(pause_s, _CONTROL_POLL_S)
            await asyncio.sleep(max(0.0, pause_s))
            try:
                if self._desired_state.has_changed():
                    await self._follow(self._desired_state.read())
                if loop.time() >= look_s:
                    await self._update()
                    look_s = loop.time() + self._poll_s
            except Exception:
                log.exception("the models directory could not be looked at")
                look_s = loop.time() + self._poll_s

    async def _refresh(self) -> None:
        """Know what is in the directory now."""
        async with self._lock:
            await self._look()

    async def _update(self) -> None:
        async with self._lock:
            await self._update_locked()

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        holders = {served.found.path: key for key, served in self._served.items()}
        try:
            bundles = await loop.run_in_executor(self._thread, _bundles, self._directory)
        except OSError as error:
            if self._listed:
                log.warning("%s cannot be read, so all stays: %s", self._directory, error)
            self._listed = False
            return
        self._listed = True
        found: dict[Key, _Found] = {}
        duplicates: list[tuple[Key, str]] = []
        # Those that are served come first, so that no other takes their name.
        for bundle, key in sorted(bundles, key=lambda each: holders.get(each[0].path) != each[1]):
            if key in found:
                reason = f"{bundle.path} is called like {found[key].path}; rename or remove one"
                if (key, reason) not in self._duplicates:
                    log.error("model %s version %s: %s", *key, reason)
                duplicates.append((key, reason))
            else:
                found[key] = bundle
        self._found, self._duplicates = found, duplicates

    async def _update_locked(self) -> None:
        """Make what is served what should be, one model after the other."""
        await self._look()
        if not self._listed:
            return
        self._refused = {
            key: (signature, reason)
            for key, (signature, reason) in self._refused.items()
            if key in self._found and self._found[key].signature == signature
        }
        for name in sorted({key[0] for key in self.keys()}):
            await self._update_model(name)

    async def _update_model(self, name: str) -> None:
        kept: set[Key] = set()
        if name not in self._wishes.unloaded:
            keys = [key for key in self._found if key[0] == name]
            for key in sorted(keys, key=lambda key: int(key[1]), reverse=True):
                if len(kept) == self._versions:
                    break
                if await self._is_served(key):
                    kept.add(key)
        for key in [key for key in self._served if key[0] == name and key not in kept]:
            self._drop(key)

    async def _is_served(self, key: Key) -> bool:
        """Return whether a bundle answers, in this form or an older one, after loading it."""
        found, served = self._found[key], self._served.get(key)
        if key in self._refused or (served is not None and served.found == found):
            return served is not None
        name, version = key
        self._loading = key
        try:
            model = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._load_bundle, found.path, version
            )
        except Exception as error:  # whatever is wrong with it
            reason = str(error) or type(error).__name__
            log.error(
                "model %s version %s is not served: %s",
                name,
                version,
                reason,
                exc_info=None if isinstance(error, BundleError) else error,
            )
            self._refused[key] = (found.signature, reason)
            self._observer.load_finished(name, False)
            return served is not None
        finally:
            self._loading = None
        model.start()
        self._served[key] = _Served(model, found)
        self._list()
        self._observer.load_finished(name, True)
        self._observer.model_loaded(name, version, True)
        log.info("model %s version %s is served", name, version)
        if served is not None:
            self._begin(served.model.drain())
        return True

    def _drop(self, key: Key) -> None:
        served = self._served.pop(key)
        self._list()
        self._observer.model_loaded(*key, False)
        log.info("model %s version %s is not served any more", *key)
        self._begin(served.model.drain())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Return a task of its own, which `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _list(self) -> None:
        by_name: dict[str, dict[str, T]] = {}
        for name, version in sorted(self._served, key=lambda key: int(key[1]), reverse=True):
            by_name.setdefault(name, {})[version] = self._served[name, version].model
        self._by_name = by_name


def _bundles(directory: Path) -> list[tuple[_Found, Key]]:
    """Return the bundles in a directory with the name and version of each, sorted by path.

    Raises:
        OSError: the directory cannot be read.
    """
    bundles: list[tuple[_Found, Key]] = []
    if (directory / MANIFEST_FILE).is_file():
        return [each for each in [_bundle(directory)] if each is not None]
    for path in _visible(directory):
        with suppress(OSError):
            candidates = [path]
            if not (path / MANIFEST_FILE).is_file():
                candidates = [each for each in _visible(path) if _VERSION.fullmatch(each.name)]
            bundles += [each for each in map(_bundle, candidates) if each is not None]
    return bundles


def _visible(directory: Path) -> list[Path]:
    return sorted(
        path for path in directory.iterdir() if not path.name.startswith(".") and path.is_dir()
    )


def _bundle(path: Path) -> tuple[_Found, Key] | None:
    """Return a bundle with its name and version; None: there is none."""
    manifest = path / MANIFEST_FILE
    signature = (_sign(manifest), _sign(path / WEIGHTS_FILE))
    try:
        if not manifest.is_file():
            return None
        with manifest.open("rb") as stream:
            content = json.loads(stream.read(MANIFEST_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        content = None
    name = content.get("name") if isinstance(content, Mapping) else None
    version = path.name if _VERSION.fullmatch(path.name) else "1"
    # One that does not say its name is shown by where it lies; loading it says what is wrong.
    by_place = path.parent.name if _VERSION.fullmatch(path.name) else path.name
    return _Found(path, signature), (name if isinstance(name, str) else by_place, version)


def _sign(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
