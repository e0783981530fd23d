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

from syncbn.bundle import MANIFEST_FILE
from syncbn.errors import TrainingError

log = logging.getLogger(__name__)

_LOCK = ".publish.lock"
_LOCK_TIMEOUT_S = 60
_TEMPORARY = ".new."
_VERSION = re.compile("[1-9][0-9]*")


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
        TrainingError: it cannot be written; `bundle` is safe.
    """
    models = directory / name
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
            versions = [int(path.name) for path in models.iterdir() if _is_version(path)]
            manifest = _manifest(bundle)
            for version in sorted(versions, reverse=True):
                path = models / str(version)
                if _manifest(path) == manifest:
                    log.info("published already, as %s", path)
                    return path
            path = models / str(max(versions, default=0) + 1)
            temporary.rename(path)
        log.info("published as %s", path)
        return path
    except (OSError, shutil.Error, Timeout) as error:
        raise TrainingError(
            f"the bundle could not be published: {error}; it is safe in {bundle}. Once that is "
            "mended, the same command with this run's run_dir publishes it, or by hand: "
            f"cp -r {bundle} {models}/.new && mv {models}/.new {models}/VERSION, a new number"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if held >= 0:
            os.close(held)


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
