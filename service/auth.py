"""API keys: which there are, by their hashes, and what each may do."""

import hashlib
import hmac
import logging
import os
import stat
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 20
_LOOK_AGAIN_S = 1.0


class Role(IntEnum):
    """What a key may do: read asks models and about them, admin loads and unloads them too."""

    READ = 1
    ADMIN = 2


class KeysFileError(Exception):
    """A file of API keys cannot be read or written, or is none; `str()` of it says why."""


@dataclass(frozen=True)
class KeyRecord:
    """What is kept of a key.

    Attributes:
        sha256: of the key, in hexadecimal.
        role: read or admin.
        label: what its maker calls it.
        created: the day, as YYYY-MM-DD.
    """

    sha256: str
    role: str
    label: str
    created: str

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 must be 64 hexadecimal digits")
        if self.role.upper() not in Role.__members__:
            raise ValueError(f"role must be read or admin, not {self.role[:20]!r}")


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

    def role(self, authorization: bytes | None, x_api_key: bytes | None) -> Role | None:
        """Return what a request may do; None: its key is missing or unknown.

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
        found: Role | None = None
        # All of them, each in constant time, so that the time tells nothing of any.
        for known, role in self._known:
            if hmac.compare_digest(known, digest):
                found = role
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

    def _digests(self) -> list[tuple[bytes, Role]]:
        return [
            (bytes.fromhex(record.sha256), Role[record.role.upper()])
            for record in read_keys(self._file)
        ]
