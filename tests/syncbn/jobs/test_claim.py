"""A store has one dispatcher, and says which."""

import os
from pathlib import Path

import pytest

from syncbn.errors import JobError
from syncbn.jobs.dispatch.claim import Claim


def test_second_dispatcher_hears_who_has_the_store(tmp_path: Path) -> None:
    first = Claim(tmp_path, "local")
    with pytest.raises(JobError, match=rf"has a dispatcher already: process {os.getpid()} on .*"):
        Claim(tmp_path, "ray")
    with pytest.raises(JobError, match=r"engine local, since .*; end that one first"):
        Claim(tmp_path, "ray")
    first.close()
    second = Claim(tmp_path, "ray")
    assert "engine ray" in (tmp_path / "dispatcher.lock").read_text()
    second.close()


def test_stores_are_apart(tmp_path: Path) -> None:
    claims = [Claim(tmp_path / name, "local") for name in ("a", "b")]
    for each in claims:
        each.close()


def test_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"cannot use .*file.jobs: Not a directory"):
        Claim(tmp_path / "file" / "jobs", "local")
