"""The command `syncbn-keys`: make, list and revoke the API keys of a file."""

import argparse
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from service.auth import LIMIT_BYTES, ROLES, KeyRecord, KeysFileError, Scope, read_keys

_LOCK_TIMEOUT_S = 30
_PREFIX = "syncbn_"  # so that people and scanners of leaked secrets know what it is
_SHOWN_DIGITS = 8
_LABEL_LIMIT = 100


def main() -> None:
    """Do what the command line says.

    Raises:
        SystemExit: with code 2 where an option is wrong, 1 where the file is.
    """
    parser = argparse.ArgumentParser(
        prog="syncbn-keys",
        description="Make an API key for syncbn-serve --api-keys FILE, and print it. The file "
        "keeps its SHA-256 alone, so that the key is shown only once. A service that runs already "
        "knows within a second.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="made where it is missing")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--scope",
        action="append",
        choices=[*Scope],
        help="make a key that may do this; may be given several times. infer: ask models and about "
        "them; jobs:read: look at training jobs; jobs:write: also submit them, and change one's "
        "own; admin: everything",
    )
    what.add_argument(
        "--role",
        choices=[*ROLES],
        help="make a key with several scopes at once: read has infer and jobs:read, admin all",
    )
    what.add_argument("--list", action="store_true", help="show what the file holds")
    what.add_argument(
        "--revoke",
        metavar="KEY",
        help="remove a key, by its label or at least the 8 digits that --list shows",
    )
    parser.add_argument(
        "--label",
        type=_label,
        default="",
        help="of a new key: who gets it, or what it is for; jobs that are submitted with it belong "
        "to this name",
    )
    arguments = parser.parse_args()
    scopes = arguments.scope or ROLES.get(arguments.role, ())
    if arguments.label and not scopes:
        parser.error("--label is for a new key, so it needs --scope or --role")
    try:
        if arguments.list:
            for record in read_keys(arguments.file):
                digits = record.sha256[:_SHOWN_DIGITS]
                allowed = ",".join(record.scopes) or record.role
                line = f"{digits}  {allowed:5}  {record.created}  {record.label}"
                # Others may have written the file, and this is a terminal.
                line = line if line.isprintable() else line.encode("unicode_escape").decode()
                sys.stdout.write(f"{line}\n")
        elif arguments.revoke is not None:
            revoke_key(arguments.file, arguments.revoke)
            sys.stderr.write(f"syncbn-keys: {arguments.revoke} is revoked\n")
        else:
            key = make_key(arguments.file, scopes, arguments.label)
            _print_key(arguments.file, key)
            sys.stderr.write("syncbn-keys: keep this key; it is not shown again\n")
    except KeysFileError as error:
        sys.stderr.write(f"syncbn-keys: {error}\n")
        raise SystemExit(1) from None


def _label(text: str) -> str:
    if not text.isprintable() or len(text) > _LABEL_LIMIT:
        raise argparse.ArgumentTypeError(
            f"must be at most {_LABEL_LIMIT} printable characters, got {text[:20]!r}"
        )
    return text


def _print_key(file: Path, key: str) -> None:
    try:
        sys.stdout.flush()
        # Not through the stream, which would try again at exit.
        os.write(sys.stdout.fileno(), f"{key}\n".encode())
    except OSError as error:
        revoke_key(file, _sha256(key))
        raise KeysFileError(
            f"cannot print the new key: {error.strerror}; it is revoked again"
        ) from error


def make_key(file: Path, scopes: Iterable[str], label: str = "") -> str:
    """Add a new key to a file, which is made where it is missing, and return the key.

    Args:
        file: as `service.auth.read_keys` takes it.
        scopes: of `service.auth.Scope`, one at least.
        label: any text of characters that can be encoded.

    Raises:
        KeysFileError: a scope is unknown, or the file is none of keys, or cannot be written; it is
            as it was then.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    record = KeyRecord(
        sha256=_sha256(key),
        label=label,
        created=datetime.now(UTC).date().isoformat(),
        scopes=tuple(dict.fromkeys(scopes)),
    )
    record.identity()

    def add(content: bytes) -> bytes:
        if content and not content.endswith(b"\n"):
            content += b"\n"
        return content + _encode(record) + b"\n"

    _change(file, add)
    return key


def revoke_key(file: Path, which: str) -> None:
    """Remove a key from a file.

    Args:
        file: as `service.auth.read_keys` takes it.
        which: its label, or the beginning of its SHA-256, of 8 digits at least.

    Raises:
        KeysFileError: no key, or more than one, is meant, or as for `make_key`.
    """

    def remove(content: bytes) -> bytes:
        found = [
            record
            for record in read_keys(file)
            # Fewer digits could be those of another key, where a label is mistyped.
            if which
            and (
                record.label == which
                or (len(which) >= _SHOWN_DIGITS and record.sha256.startswith(which.lower()))
            )
        ]
        if len({record.sha256 for record in found}) != 1:
            raise KeysFileError(
                f"{len(found)} keys in {file} are called {which[:80]!r}; --list shows what there is"
            )
        digest = found[0].sha256.encode()
        lines = content.splitlines(keepends=True)
        return b"".join(
            line for line in lines if line.lstrip().startswith(b"#") or digest not in line
        )

    _change(file, remove)


def _change(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's content as a whole, one process after the other."""
    target = Path(os.path.realpath(file))  # a link stays one
    try:
        with FileLock(f"{target}.lock", timeout=_LOCK_TIMEOUT_S):
            content, status = b"", None
            if target.exists():
                read_keys(file)
                content, status = target.read_bytes(), target.stat()
            content = change(content)
            if len(content) > LIMIT_BYTES:
                raise KeysFileError(f"{file} is full; revoke keys that are not used any more")
            _replace(target, content, status)
    except Timeout:
        raise KeysFileError(f"{file} is being changed by another process; try again") from None
    except OSError as error:
        raise KeysFileError(f"cannot write the API keys {file}: {error.strerror}") from error


def _replace(file: Path, content: bytes, status: os.stat_result | None) -> None:
    """Write a file's new content beside it, and put it in its place with the owner and mode."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if status is not None:
                made = os.fstat(descriptor)
                if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
                    # Or the service, whose file it is, could not read it any more.
                    try:
                        os.fchown(descriptor, status.st_uid, status.st_gid)
                    except PermissionError:
                        raise KeysFileError(
                            f"{file} is another user's or group's; run syncbn-keys as its owner"
                        ) from None
                os.fchmod(descriptor, status.st_mode & 0o777)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # where a file system has no such thing
            os.fsync(directory)  # or the new name could be lost with the power
    finally:
        os.close(directory)


def _encode(record: KeyRecord) -> bytes:
    values = {key: value for key, value in msgspec.to_builtins(record).items() if key != "role"}
    return msgspec.json.encode(values)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


if __name__ == "__main__":
    main()
