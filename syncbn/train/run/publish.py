"""Publication: a run's bundle copied to where a service looks for new versions of a model."""

import fcntl
import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from syncbn.errors import TrainingError
from syncbn.train.run.reasons import PUBLISH

log = logging.getLogger(__name__)

# As in syncbn.bundle, which brings torch.
MANIFEST_FILE = "bundle.json"
_LOCK = ".publish.lock"
_LOCK_TIMEOUT_S = 60
_TEMPORARY = ".new."
_VERSION = re.compile("[1-9][0-9]*")


def whole_bundle(directory: Path, name: str) -> str | None:
    """Return why no version of a model would be served: it has none; None: one would be.

    Args:
        directory: of all models.
        name: of the model.
    """
    if not (directory / name / MANIFEST_FILE).is_file():
        return None
    return (
        f"{name} in it is one bundle without versions, beside which no version is served: choose "
        f"another name, or move the bundle to {name}/1"
    )


def publish(bundle: Path, directory: Path, name: str) -> Path:
    """Copy a bundle to `directory/name/version`, with the version after the newest that is there.

    It appears whole, or not at all, and no two get the same version. A bundle that is there
    already, in whatever version, is not copied again: a later run's would otherwise lose its place
    to an attempt that is repeated.

    Args:
        bundle: what to publish.
        directory: of all models.
        name: of the model.

    Returns:
        The copy.

    Raises:
        TrainingError: it cannot be written, or would not be served; `bundle` is safe.
    """
    models = directory / name
    if (why := whole_bundle(directory, name)) is not None:
        raise TrainingError(f"{directory}: {why}").because(PUBLISH)
    temporary: Path | None = None
    held = -1
    try:
        if not models.exists():
            models.mkdir(parents=True, exist_ok=True)
            models.chmod(0o755)  # readable to a service of another user, as all of it
        # Copied without the lock, which others would have to wait for.
        with FileLock(models / _LOCK, timeout=_LOCK_TIMEOUT_S):
            _remove_abandoned(models)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=models))
            held = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # where the file system knows no locks, others let it be
                fcntl.flock(held, fcntl.LOCK_EX)
        shutil.copytree(bundle, temporary, dirs_exist_ok=True)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        with FileLock(models / _LOCK, timeout=_LOCK_TIMEOUT_S):
            version = published_version(bundle, directory, name)
            if version is not None:
                log.info("published already, as %s", models / str(version))
                return models / str(version)
            versions = _versions(models)
            path = models / str(max(versions, default=0) + 1)
            temporary.rename(path)
        log.info("published as %s", path)
        return path
    except (OSError, shutil.Error, Timeout) as error:
        raise TrainingError(
            f"the bundle could not be published: {error}; it is safe in {bundle}. Once that is "
            "mended, the same command with this run's run_dir publishes it, or by hand: "
            f"cp -r {bundle} {models}/.new && mv {models}/.new {models}/VERSION, a new number"
        ).because(PUBLISH) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if held >= 0:
            os.close(held)


def published_version(bundle: Path, directory: Path, name: str) -> int | None:
    """Return the newest version of a published model that is a copy of a bundle, or None.

    Args:
        bundle: of the run.
        directory: of all models.
        name: of the model.
    """
    models, manifest = directory / name, _manifest(bundle)
    if manifest is None:
        return None
    for version in sorted(_versions(models), reverse=True):
        if _manifest(models / str(version)) == manifest:
            return version
    return None


def _versions(models: Path) -> list[int]:
    return [int(path.name) for path in models.glob("*") if _is_version(path)]


def _remove_abandoned(models: Path) -> None:
    """Remove copies of which the writer was killed: nobody holds them."""
    for copy in models.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            descriptor = os.open(copy, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy)
            finally:
                os.close(descriptor)


def _is_version(path: Path) -> bool:
    return _VERSION.fullmatch(path.name) is not None


def _manifest(bundle: Path) -> bytes | None:
    file = bundle / MANIFEST_FILE
    return file.read_bytes() if file.is_file() else None
