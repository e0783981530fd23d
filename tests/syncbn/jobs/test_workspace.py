"""One job's directory: its lock, who has it, and which attempt may run."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from syncbn.errors import ConfigError
from syncbn.jobs.workspace import Workspace
from syncbn.train.launch.permit import check_permit
from syncbn.train.run.lock import LOCK_FILE

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")

_HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace.of_job(tmp_path, "abc")
    made.run.path.mkdir(parents=True)
    return made


def test_run_of_which_a_file_has_taken_the_place_is_not_held(workspace: Workspace) -> None:
    workspace.run.path.rmdir()
    workspace.run.path.touch()
    assert not workspace.is_held()


@contextmanager
def _held(workspace: Workspace) -> Generator[int]:
    """Have another process hold the lock of the run."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(workspace.run.path / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.stdin.close()
        process.wait(30)


def test_run_is_held_as_long_as_a_process_has_its_lock(workspace: Workspace) -> None:
    assert not workspace.is_held()
    with _held(workspace) as process:
        assert workspace.is_held()
        assert workspace.holders() == [process]
    assert not workspace.is_held()
    assert workspace.holders() == []


def test_run_that_was_never_opened_is_not_held(tmp_path: Path) -> None:
    workspace = Workspace.of_job(tmp_path, "abc")
    assert not workspace.is_held()
    assert workspace.holders() == []


def test_looking_at_the_lock_keeps_nobody_from_looking(workspace: Workspace) -> None:
    with workspace.run.lock():
        pass
    looking = os.open(workspace.run.path / LOCK_FILE, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as another that looks just now
    try:
        assert not workspace.is_held()
    finally:
        os.close(looking)
    with workspace.run.lock():
        assert workspace.is_held()


def test_descriptor_is_not_kept_by_who_looks(workspace: Workspace) -> None:
    with workspace.run.lock():
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(10):
            workspace.is_held()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_holders_are_found_by_the_file_and_not_by_its_name(
    workspace: Workspace, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "work")
    with _held(workspace) as process:
        assert Workspace(link / "abc").holders() == [process]


def test_permit_is_for_one_attempt(workspace: Workspace) -> None:
    workspace.allow(2)
    assert workspace.allowed() == 2
    check_permit(str(workspace.permit(2)[0]), workspace.permit(2)[1])
    for other in (1, 3):
        with pytest.raises(ConfigError, match="the time of this attempt is over"):
            check_permit(str(workspace.permit(other)[0]), workspace.permit(other)[1])


def test_permit_that_was_taken_away_is_none(workspace: Workspace) -> None:
    workspace.allow(2)
    workspace.revoke()
    assert workspace.allowed() == 0
    with pytest.raises(ConfigError, match="the time of this attempt is over"):
        check_permit(str(workspace.permit(2)[0]), workspace.permit(2)[1])


def test_taking_a_permit_away_tells_for_which_attempt_it_was(workspace: Workspace) -> None:
    assert workspace.prepared() == 0
    workspace.revoke()
    assert workspace.prepared() == 0
    workspace.allow(2)
    assert workspace.prepared() == 2
    for _ in range(2):
        workspace.revoke()
        assert workspace.prepared() == 2


@pytest.mark.parametrize("content", ["", "two", "1\n2\n", "\0"])
def test_permit_that_is_damaged_is_none(workspace: Workspace, content: str) -> None:
    workspace.permit(2)[0].write_text(content)
    assert (workspace.allowed(), workspace.prepared()) == (0, 0)
    workspace.revoke()
    assert workspace.allowed() == 0


def test_header_tells_the_attempt_and_the_time(workspace: Workspace) -> None:
    header = workspace.header(3)
    assert re.fullmatch(r"=== attempt 3, \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ===", header)
