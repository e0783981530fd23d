import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import auth
from service.app import create_app
from service.auth import ROLES, Identity, Keys, KeysFileError, Scope, read_keys
from service.keys import make_key, revoke_key
from service.settings import Settings
from tests.support.processes import run

KEYS = [sys.executable, "-m", "service.keys"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_command_prints_a_new_key_alone_and_keeps_its_hash(file: Path, tmp_path: Path) -> None:
    command = [*KEYS, str(file), "--role", "admin", "--label", "mine"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    key = made.stdout.strip()
    assert re.fullmatch(r"syncbn_[A-Za-z0-9_-]{43}", key)
    assert key not in file.read_text()
    assert key not in made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert Keys(file).identify(f"Bearer {key}".encode(), None) == Identity(
        "mine", frozenset({Scope.ADMIN})
    )
    listed = run([*KEYS, str(file), "--list"], tmp_path).stdout
    assert re.fullmatch(r"[0-9a-f]{8}  admin  \d{4}-\d\d-\d\d  mine\n", listed)
    assert run([*KEYS, str(file), "--revoke", "mine"], tmp_path).returncode == 0
    assert read_keys(file) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["FILE"], 2, "one of the arguments --scope --role --list --revoke is required"),
        (["FILE", "--role", "root"], 2, "invalid choice: 'root'"),
        (["FILE", "--scope", "jobs"], 2, "invalid choice: 'jobs'"),
        (["FILE", "--label", "x", "--list"], 2, "so it needs --scope or --role"),
        (
            ["/dev/null/keys", "--role", "read"],
            1,
            "cannot write the API keys /dev/null/keys: ",
        ),
        (["FILE", "--list"], 1, "cannot read the API keys"),
        (["FILE", "--revoke", "x"], 1, "cannot read the API keys"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = run([*KEYS, *(each.replace("FILE", "keys") for each in arguments)], tmp_path)
    assert result.returncode == code
    assert message in result.stdout
    assert "Traceback" not in result.stdout


def test_label_that_several_keys_have_revokes_none(file: Path) -> None:
    make_key(file, ROLES["read"], "a")
    make_key(file, ROLES["read"], "a")
    with pytest.raises(KeysFileError, match=r"2 keys in .* are called 'a'"):
        revoke_key(file, "a")
    with pytest.raises(KeysFileError, match="0 keys in"):
        revoke_key(file, "b")
    revoke_key(file, read_keys(file)[0].sha256[:8])
    assert len(read_keys(file)) == 1


def test_prefix_of_few_digits_revokes_none(file: Path) -> None:
    make_key(file, ROLES["read"], "a")
    digits = read_keys(file)[0].sha256
    for few in (digits[:1], digits[:7]):
        with pytest.raises(KeysFileError, match="0 keys in"):
            revoke_key(file, few)
    revoke_key(file, digits[:8].upper())
    assert read_keys(file) == []


def test_key_that_is_there_twice_is_revoked_and_comments_on_it_stay(file: Path) -> None:
    make_key(file, ROLES["read"], "a")
    line = file.read_text()
    file.write_text(f"# {line}{line}{line}")
    revoke_key(file, "a")
    assert file.read_text() == f"# {line}"


@pytest.mark.parametrize("label", [b"two\nlines", b"\x1b[31mred", b"\xff", b"x" * 101])
def test_label_that_is_no_short_line_is_refused(file: Path, tmp_path: Path, label: bytes) -> None:
    result = run([*KEYS, str(file), "--role", "read", "--label", os.fsdecode(label)], tmp_path)
    assert result.returncode == 2
    assert "must be at most 100 printable characters" in result.stdout
    assert not file.exists()


def test_list_cannot_be_forged(file: Path, tmp_path: Path) -> None:
    make_key(file, ROLES["read"], "a\n00000000  admin\x1b[31m")
    listed = run([*KEYS, str(file), "--list"], tmp_path).stdout
    assert len(listed.splitlines()) == 1
    assert r"a\n00000000  admin\x1b[31m" in listed


def test_key_that_cannot_be_printed_is_revoked(file: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*KEYS, str(file), "--role", "read"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr.startswith("syncbn-keys: cannot print the new key: No space left")
    assert result.stderr.count("\n") == 1
    assert read_keys(file) == []


def test_link_stays_one(file: Path, tmp_path: Path) -> None:
    make_key(file, ROLES["read"])
    link = tmp_path / "link"
    link.symlink_to(file)
    make_key(link, ROLES["read"])
    assert link.is_symlink()
    assert len(read_keys(file)) == 2


def test_file_whose_owner_cannot_be_kept_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, uid: int, gid: int) -> None:
        raise PermissionError

    make_key(file, ROLES["read"])
    before = file.read_bytes()
    status = file.stat()
    other = os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(os, "fstat", lambda descriptor: other)  # pyright: ignore[reportUnknownLambdaType] -- of os
    with pytest.raises(KeysFileError, match="run syncbn-keys as its owner"):
        make_key(file, ROLES["read"])
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [each.name for each in file.parent.glob(f".{file.name}.*")] == []


def test_full_file_is_not_written(file: Path) -> None:
    file.write_bytes(b"#" * auth.LIMIT_BYTES)
    with pytest.raises(KeysFileError, match="is full; revoke keys"):
        make_key(file, ROLES["read"])
    file.write_bytes(b"#" * (auth.LIMIT_BYTES + 1))
    with pytest.raises(KeysFileError, match="is not a regular file of at most 1048576 bytes"):
        read_keys(file)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(file: Path, make: Callable[[Path], None]) -> None:
    make(file)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeysFileError, match="is not a regular file"):
        Keys(file)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_comments_and_the_files_mode_are_kept(file: Path) -> None:
    file.write_text("# who may ask\n\n")
    file.chmod(0o640)
    make_key(file, ROLES["read"])
    assert file.read_text().startswith("# who may ask\n\n{")
    assert file.stat().st_mode & 0o777 == 0o640


def test_keys_made_at_once_are_all_there(file: Path) -> None:
    threads = [threading.Thread(target=make_key, args=(file, ROLES["read"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(read_keys(file)) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("key", "line 1, is not an API key: JSON is malformed"),
        ("\n{}", "line 2, is not an API key: Object missing required field `sha256`"),
        (
            json.dumps({"sha256": "xyz", "role": "read", "label": "", "created": ""}),
            "sha256 must be 64 hexadecimal digits",
        ),
    ],
)
def test_broken_file_is_refused_and_not_written(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(KeysFileError, match=re.escape(message)):
        Keys(file)
    with pytest.raises(KeysFileError):
        make_key(file, ROLES["read"])
    assert file.read_text() == content


def test_identity_is_that_of_a_known_key_alone(file: Path) -> None:
    anna = make_key(file, ["infer", "jobs:write"], "anna").encode()
    nobody, other = (make_key(file, ["admin"]).encode() for _ in range(2))
    keys = Keys(file)
    expected = Identity("anna", frozenset({Scope.INFER, Scope.JOBS_WRITE}))
    assert keys.identify(b"Bearer " + anna, None) == expected
    assert keys.identify(b"bearer " + anna, None) == expected
    assert keys.identify(None, anna) == expected
    for wrong in (b"", b"Bearer", b"Bearer ", b"Basic " + anna, anna, b"Bearer " + anna[:-1]):
        assert keys.identify(wrong, None) is None
    assert keys.identify(None, None) is None
    assert keys.identify(None, b"") is None
    assert keys.identify(b"Bearer wrong", anna) is None
    labels = [found.label for key in (nobody, other) if (found := keys.identify(None, key))]
    assert len(set(labels)) == 2
    assert all(re.fullmatch("key-[0-9a-f]{8}", label) for label in labels)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["infer"], {"infer"}),
        (["jobs:read"], {"jobs:read"}),
        (["jobs:write"], {"jobs:read", "jobs:write"}),
        (["infer", "jobs:read"], {"infer", "jobs:read"}),
        (["admin"], {"infer", "jobs:read", "jobs:write", "admin"}),
    ],
)
def test_scopes_allow_what_they_say(file: Path, scopes: list[str], allowed: set[str]) -> None:
    identity = Keys(file_with(file, scopes=scopes)).identify(None, b"k")
    assert identity is not None
    assert {scope for scope in Scope if identity.may(scope)} == allowed


def file_with(file: Path, **record: Any) -> Path:
    """Write a file of one key, `k`."""
    digest = hashlib.sha256(b"k").hexdigest()
    line = {"sha256": digest, "label": "", "created": "2026-01-01"} | record
    file.write_text(json.dumps(line) + "\n")
    return file


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("read", {"infer", "jobs:read"}), ("admin", {"infer", "jobs:read", "jobs:write", "admin"})],
)
def test_roles_of_earlier_files_count(file: Path, role: str, allowed: set[str]) -> None:
    identity = Keys(file_with(file, role=role)).identify(None, b"k")
    assert identity is not None
    assert {scope for scope in Scope if identity.may(scope)} == allowed


@pytest.mark.parametrize(
    "record", [{"role": "root"}, {"scopes": ["infer", "fly"]}, {"scopes": []}, {}]
)
def test_key_that_this_version_does_not_know_is_passed_over_and_logged(
    file: Path, record: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file_with(file, **record)
    good = make_key(file, ["infer"]).encode()
    keys = Keys(file)
    assert keys.identify(None, b"k") is None
    assert keys.identify(None, good) is not None
    assert "has the unknown scope or role" in caplog.text
    assert "there are infer, jobs:read, jobs:write, admin" in caplog.text
    revoke_key(file, hashlib.sha256(b"k").hexdigest()[:8])
    assert len(read_keys(file)) == 1


def test_key_with_an_unknown_scope_is_not_made(file: Path) -> None:
    with pytest.raises(KeysFileError, match="unknown scope or role 'fly'"):
        make_key(file, ["infer", "fly"])
    assert not file.exists()


def test_changes_of_the_file_count_at_once_unless_they_break_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "_LOOK_AGAIN_S", -1.0)
    first = make_key(file, ROLES["read"], "first").encode()
    keys = Keys(file)
    second = make_key(file, ROLES["read"]).encode()
    assert keys.identify(None, second) is not None
    revoke_key(file, "first")
    assert keys.identify(None, first) is None
    file.write_text("broken")
    assert keys.identify(None, second) is not None
    assert "the API keys stay as they were" in caplog.text
    for _ in range(3):
        keys.identify(None, b"x")
    assert caplog.text.count("the API keys stay as they were") == 1
    file.unlink()
    assert keys.identify(None, second) is not None
    assert second.decode() not in caplog.text


def test_file_that_could_not_be_read_for_a_while_is_read_then(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "_LOOK_AGAIN_S", -1.0)
    revoked = make_key(file, ROLES["read"], "revoked").encode()
    keys = Keys(file)

    def fail(file: Path) -> list[auth.KeyRecord]:
        raise KeysFileError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(auth, "read_keys", fail)
        revoke_key(file, "revoked")
        for _ in range(3):
            assert keys.identify(None, revoked) is not None
    assert caplog.text.count("too many open files") == 1
    assert keys.identify(None, revoked) is None


# The service


@pytest.fixture
def locked(models: Path, file: Path) -> Generator[tuple[TestClient, str, str]]:
    read, admin = (make_key(file, ROLES[role]) for role in ("read", "admin"))
    with TestClient(create_app(Settings(models=models, api_keys=file))) as client:
        yield client, read, admin


LOAD = "/v2/repository/models/shapes/load"


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/static/page.js", "/v2/health/live", "/v2/health/ready"],
)
def test_health_and_pages_need_no_key(locked: tuple[TestClient, str, str], path: str) -> None:
    assert locked[0].get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/models"),
        ("GET", "/metrics"),
        ("GET", "/nope"),
        ("GET", "//v2/models"),
        ("GET", "/v2/health/live/../../models"),
        ("GET", "/v2/models/shapes/drift"),
        ("POST", "/v2/models/shapes/infer"),
        ("POST", "/predict/shapes"),
        ("POST", "/v2/repository/index"),
        ("POST", LOAD),
    ],
)
def test_everything_else_needs_a_key(
    locked: tuple[TestClient, str, str], method: str, path: str
) -> None:
    client, read, _ = locked
    answer = client.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "an API key is needed" in answer.json()["error"]
    wrong = client.request(method, path, headers={"Authorization": "Bearer x"})
    assert (wrong.status_code, wrong.json()) == (401, {"error": "this API key is not known"})
    for headers in ({"Authorization": f"Bearer {read}"}, {"X-API-Key": read}):
        assert client.request(method, path, headers=headers).status_code != 401


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/v2/models", "infer"),
        ("POST", "/v2/repository/index", "infer"),
        ("POST", "/predict/shapes", "infer"),
        ("POST", LOAD, "admin"),
        ("GET", "/v1/jobs", "jobs:read"),
        ("GET", "/v1/events", "jobs:read"),
        ("POST", "/v1/jobs", "jobs:write"),
        ("POST", "/v1/jobs/x/cancel", "jobs:write"),
        ("DELETE", "/v1/jobs/x", "jobs:write"),
    ],
)
def test_key_without_the_scope_is_told_which(
    models: Path, file: Path, method: str, path: str, needed: str
) -> None:
    scopes = {"infer": "jobs:read", "admin": "jobs:write", "jobs:read": "infer"}
    key = make_key(file, [scopes.get(needed, "jobs:read")])
    with TestClient(create_app(Settings(models=models, api_keys=file))) as client:
        answer = client.request(method, path, headers={"X-API-Key": key})
        assert answer.status_code == 403
        assert f"this needs an API key with the scope {needed}; yours has" in answer.text
        assert client.get("/metrics", headers={"X-API-Key": key}).status_code == 200


def test_loading_needs_an_admin(locked: tuple[TestClient, str, str]) -> None:
    client, read, admin = locked
    answer = client.post(LOAD, headers={"X-API-Key": read})
    assert (answer.status_code, list(answer.json())) == (403, ["error"])
    assert client.post(LOAD, headers={"X-API-Key": admin}).status_code == 200


def test_no_auth_wins_over_keys(models: Path, tmp_path: Path) -> None:
    settings = Settings(models=models, api_keys=tmp_path / "missing", no_auth=True)
    with TestClient(create_app(settings)) as client:
        assert client.get("/v2/models").status_code == 200
