"""The wheel without the checkout: it holds all that training and serving need."""

import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, run

_UPLOT = "service/static/vendor/uplot"  # of others, under a license of its own


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it, without its dependencies, into a directory of its own."""
    directory = tmp_path_factory.mktemp("wheel")
    wheel = _built(directory)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def _built(directory: Path, cxx: str = "") -> Path:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory)]
    result = run([*build, str(REPOSITORY)], directory, CXX=cxx)
    assert result.returncode == 0, result.stdout
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_wheel_without_a_compiler_is_pure_and_computes_the_same(tmp_path: Path) -> None:
    wheel = _built(tmp_path, cxx="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    script = "import torch, syncbn; print(syncbn.SyncBatchNorm(3)(torch.ones(2, 3, 4)).abs().max())"
    result = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "no native kernels (they were not compiled with this installation)" in result.stdout
    assert "tensor(0., grad_fn=" in result.stdout


@pytest.mark.long
def test_wheel_holds_the_packages_configs_types_and_licence(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"syncbn/py.typed", "service/py.typed", "syncbn/conf/config.yaml"} <= names
    assert "syncbn/_native/libsyncbn.so" in names
    assert {
        f"syncbn/{file.relative_to(REPOSITORY)}" for file in REPOSITORY.glob("conf/*/*.yaml")
    } <= names
    (metadata,) = installed.glob("*.dist-info")
    assert (metadata / "licenses" / "docs" / "LICENSE").exists()
    assert "MIT License" in (metadata / "licenses" / _UPLOT / "LICENSE").read_text()
    assert {f"{_UPLOT}/{file}" for file in ("uPlot.iife.min.js", "uPlot.min.css")} <= names
    assert {
        str(file.relative_to(REPOSITORY))
        for file in (REPOSITORY / "service" / "static").iterdir()
        if file.is_file()
    } <= names
    assert {name.split("/")[0] for name in names} == {"syncbn", "service", metadata.name}
    scripts = (metadata / "entry_points.txt").read_text()
    assert "syncbn-train = syncbn.train.launch.command:main" in scripts
    assert "syncbn-serve = service.__main__:main" in scripts


@pytest.mark.long
def test_installed_wheel_trains_and_serves_from_another_directory(
    installed: Path, tmp_path: Path
) -> None:
    path = str(installed)
    train = [sys.executable, "-m", "syncbn.train", "max_steps=2", "model.width=4"]
    result = run([*train, "track=none", f"run_dir={tmp_path / 'run'}"], tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout
    where = "import syncbn, service; print(syncbn.__file__, service.__file__)"
    located = run([sys.executable, "-c", where], tmp_path, PYTHONPATH=path).stdout.split()
    assert all(file.startswith(path) for file in located)

    log = tmp_path / "service.log"
    serve = [sys.executable, "-m", "service", "--models", str(tmp_path / "run" / "bundle")]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*serve, "--port", "0"],
            cwd=tmp_path,
            env={"PYTHONPATH": path, "PATH": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while "startup complete" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        url = re.findall(r" at (http://127\.0\.0\.1:\d+),", log.read_text())[0]
        with urllib.request.urlopen(f"{url}/v2/models/digits-cnn", timeout=30) as response:
            assert b'"shape":[-1,1,8,8]' in response.read()
    finally:
        server.terminate()
        server.wait(30)
