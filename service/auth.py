"""API keys: which there are, by their hashes, and what each may do."""

import hashlib
import hmac
import logging
import os
import stat
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0


class Scope(StrEnum):
    """One of the things that a key may allow.

    infer: ask models, and about them. jobs:read: look at training jobs. jobs:write: submit jobs and
    change one's own, and look at all. admin: everything, also load and unload models, and change
    jobs of others.
    """

    INFER = "infer"
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    ADMIN = "admin"


# What the roles of earlier files of keys allow.
ROLES = {"read": (Scope.INFER, Scope.JOBS_READ), "admin": (Scope.ADMIN,)}
_IMPLIED = {Scope.JOBS_WRITE: {Scope.JOBS_READ}, Scope.ADMIN: set(Scope)}


@dataclass(frozen=True)
class Identity:
    """Who asks, and for what a key was given out.

    Attributes:
        label: what the key's maker calls its holder, who owns the jobs submitted with it.
        scopes: the key's.
    """

    label: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Return whether the scopes hold one, or another that implies it."""
        return any(scope == each or scope in _IMPLIED.get(each, ()) for each in self.scopes)


# Who asks where no keys are needed.
ANYBODY = Identity("anonymous", frozenset({Scope.ADMIN}))


class KeysFileError(Exception):
    """A file of API keys cannot be read or written, or is none; `str()` of it says why."""


@dataclass(frozen=True)
class KeyRecord:
    """What is kept of a key.

    Attributes:
        sha256: of the key, in hexadecimal.
        label: what its maker calls it.
        created: the day, as YYYY-MM-DD.
        scopes: what it allows.
        role: in files of earlier versions instead: read or admin.
    """

    sha256: str
    label: str
    created: str
    scopes: tuple[str, ...] = ()
    role: str = ""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 must be 64 hexadecimal digits")

    def identity(self) -> Identity:
        """Return whom it lets in.

        Raises:
            KeysFileError: a scope or the role is unknown, or there is none.
        """
        scopes = self.scopes or ROLES.get(self.role, (self.role,))
        unknown = sorted(set(scopes) - set(Scope))
        if unknown:
            raise KeysFileError(
                f"key {self.sha256[:8]} has the unknown scope or role {unknown[0][:20]!r}; "
                f"there are {', '.join(Scope)}"
            )
        # Two keys without a label are not the same person.
        label = self.label or f"key-{self.sha256[:8]}"
        return Identity(label, frozenset(map(Scope, scopes)))


def read_keys(file: Path) -> list[KeyRecord]:
    """Return what a file holds: a line of JSON for each key, among empty ones and # comments.

    Raises:
        KeysFileError: it cannot be read, is not a regular file of at most 1 MiB, or a line is none
            of these.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = b""
            if is_regular:
                with os.fdopen(descriptor, "rb", closefd=False) as stream:
                    content = stream.read(LIMIT_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KeysFileError(
            f"cannot read the API keys {file}: {error.strerror}; syncbn-keys makes such a file"
        ) from error
    if not is_regular or len(content) > LIMIT_BYTES:
        raise KeysFileError(f"{file} is not a regular file of at most {LIMIT_BYTES} bytes")
    records: list[KeyRecord] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            records.append(msgspec.json.decode(line, type=KeyRecord))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise KeysFileError(f"{file}, line {number}, is not an API key: {error}") from None
    return records


class Keys:
    """Who may do what, by a file of keys, which is read again when it changes.

    Args:
        file: as `read_keys` takes it.

    Raises:
        KeysFileError: as `read_keys`. Later, a file that is broken is logged, and what it held
            before stays valid.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signature = self._sign()
        self._known = self._digests()
        self._failure = ""  # why the file as it is now was not taken over
        self._look_again_s = time.monotonic() + _LOOK_AGAIN_S

    def identify(self, authorization: bytes | None, x_api_key: bytes | None) -> Identity | None:
        """Return who sent a request; None: its key is missing or unknown.

        Args:
            authorization: the header of that name, with the scheme Bearer.
            x_api_key: the header of that name, which is looked at where the other is missing.
        """
        if time.monotonic() > self._look_again_s:
            self._look_again()
        key = x_api_key
        if authorization is not None:
            scheme, _, key = authorization.partition(b" ")
            if scheme.lower() != b"bearer":
                return None
        if not key:
            return None
        digest = hashlib.sha256(key.strip()).digest()
        found: Identity | None = None
        # All of them, each in constant time, so that the time tells nothing of any.
        for known, identity in self._known:
            if hmac.compare_digest(known, digest):
                found = identity
        return found

    def _look_again(self) -> None:
        self._look_again_s = time.monotonic() + _LOOK_AGAIN_S
        signature = self._sign()
        is_changed = signature != self._signature
        # What failed is tried again, as it need not have been the file's fault.
        if not is_changed and not self._failure:
            return
        self._signature = signature
        try:
            self._known = self._digests()
        except KeysFileError as error:
            if is_changed or str(error) != self._failure:
                log.error("the API keys stay as they were: %s", error)
            self._failure = str(error)
            return
        self._failure = ""
        log.info("API keys read again from %s: %d", self._file, len(self._known))

    def _sign(self) -> tuple[int, ...] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        # The time of the inode's change too: it tells that the file may be read now.
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size

    def _digests(self) -> list[tuple[bytes, Identity]]:
        known: list[tuple[bytes, Identity]] = []
        for record in read_keys(self._file):
            try:
                known.append((bytes.fromhex(record.sha256), record.identity()))
            except KeysFileError as error:  # of a later version, say; the others are good
                log.error("%s: %s; it lets nobody in", self._file, error)
        return known
