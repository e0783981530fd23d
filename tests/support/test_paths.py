"""`testpaths` of pyproject.toml, which lists directories for the sake of their order."""

import tomllib

from tests.support.processes import REPOSITORY


def test_all_test_files_are_listed() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns: list[str] = settings["tool"]["pytest"]["ini_options"]["testpaths"]
    listed = {
        file
        for pattern in patterns
        for place in REPOSITORY.glob(pattern.rstrip("/"))
        for file in (place.rglob("test_*.py") if place.is_dir() else [place])
    }
    assert listed == set((REPOSITORY / "tests").rglob("test_*.py"))
