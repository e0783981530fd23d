import fcntl
import os
import threading
from pathlib import Path

import pytest

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError, TrainingError
from syncbn.train.config import compose_config
from syncbn.train.run.directory import open_run_directory
from syncbn.train.run.publish import publish
from tests.support.jobs import Job


def _bundle(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "bundle.json").write_text(content)
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def _versions(models: Path) -> list[str]:
    return sorted(path.name for path in (models / "m").iterdir() if not path.name.startswith("."))


def test_each_bundle_becomes_the_next_version_and_none_twice(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for number in range(1, 12):
        bundle = _bundle(tmp_path / str(number), f"{number}")
        path = publish(bundle, models, "m")
        assert path == models / "m" / str(number)
        assert (path / "bundle.json").read_text() == f"{number}"
        assert publish(bundle, models, "m") == path  # an attempt that was repeated
    assert len(_versions(models)) == 11


def test_copy_is_readable_to_others(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "{}")
    bundle.chmod(0o700)
    (bundle / "bundle.json").chmod(0o600)
    path = publish(bundle, tmp_path / "models", "m")
    assert path.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in path.iterdir())


def test_other_directories_are_no_versions(tmp_path: Path) -> None:
    for name in ("007", "1.5", "new", ".9.x", "3"):
        (tmp_path / "models" / "m" / name).mkdir(parents=True)
    assert publish(_bundle(tmp_path / "b", "{}"), tmp_path / "models", "m").name == "4"


def test_runs_that_publish_at_once_get_versions_of_their_own(tmp_path: Path) -> None:
    bundles = [_bundle(tmp_path / str(number), str(number)) for number in range(8)]
    threads = [
        threading.Thread(target=publish, args=(bundle, tmp_path / "models", "m"))
        for bundle in bundles
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert _versions(tmp_path / "models") == [str(number) for number in range(1, 9)]
    written = {path.read_text() for path in (tmp_path / "models").glob("m/*/bundle.json")}
    assert len(written) == 8


def test_copy_of_a_killed_attempt_is_removed_and_one_under_way_is_not(tmp_path: Path) -> None:
    models = tmp_path / "models" / "m"
    models.mkdir(parents=True)
    for name in (".new.killed", ".new.busy"):
        _bundle(models / name, "{}")
    busy = os.open(models / ".new.busy", os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_EX)
    publish(_bundle(tmp_path / "bundle", "{}"), tmp_path / "models", "m")
    os.close(busy)
    assert {path.name for path in models.iterdir() if path.is_dir()} == {"1", ".new.busy"}


def test_failure_leaves_nothing_behind_and_says_how_to_go_on(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "{}")
    (bundle / "model.safetensors").unlink()
    (bundle / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(TrainingError, match=r"could not be published: .* it is safe in .*bundle"):
        publish(bundle, tmp_path / "models", "m")
    assert _versions(tmp_path / "models") == []
    assert not list((tmp_path / "models" / "m").glob(".[!p]*"))


def test_directory_that_cannot_be_published_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = compose_config([f"publish={tmp_path}/file/models", f"run_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"publish=.*: cannot be made: Not a directory"):
        open_run_directory(config)
    assert not (tmp_path / "run").exists()


def test_version_that_would_not_be_served_beside_a_bundle_is_refused(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    _bundle(models / "m", "{}")
    with pytest.raises(TrainingError, match=r"m in it is one bundle without"):
        publish(_bundle(tmp_path / "bundle", "{}"), models, "m")
    config = compose_config([f"publish={models}", "name=m", f"run_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"publish=.*: m in it is one bundle without versions"):
        open_run_directory(config)
    assert not (models / "m" / "1").exists()


def test_where_a_run_is_published_is_no_part_of_the_job(tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path}/run"
    open_run_directory(compose_config([run_dir]))
    open_run_directory(compose_config([run_dir, f"publish={tmp_path}/models"]))
    assert os.access(tmp_path / "models", os.W_OK)


def test_run_that_cannot_publish_is_complete_and_repeated_publishes_once(tmp_path: Path) -> None:
    model = tmp_path / "models" / "digits-cnn"
    what = (tmp_path / "run", f"publish={model.parent}", "max_steps=2", "launch.nproc=2")
    job = Job(*what)
    model.write_text("")  # where a directory should be made, two steps from now
    assert job.wait() == 1
    run, result = job.run, job.run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "publish")
    assert "could not be published" in str(result.error)
    assert f"it is safe in {run.bundle_dir}" in str(result.error)
    assert (run.path / "curves.png").is_file()
    trained = run.read_metrics()
    model.unlink()
    assert Job(*what).wait() == 0
    assert run.read_metrics() == trained
    assert read_bundle(model / "1").manifest == read_bundle(run.bundle_dir).manifest
    run.result_file.unlink()  # as where the attempt was killed right after it had published
    assert Job(*what).wait() == 0
    assert [path.name for path in model.iterdir() if path.name[0] != "."] == ["1"]


def test_repeated_attempt_does_not_take_the_place_of_a_later_run(tmp_path: Path) -> None:
    first, second = (_bundle(tmp_path / name, name) for name in "ab")
    models = tmp_path / "models"
    path = publish(first, models, "m")
    publish(second, models, "m")
    assert publish(first, models, "m") == path
    assert _versions(models) == ["1", "2"]


def test_model_is_readable_to_others_whatever_the_umask(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "{}")
    before = os.umask(0o077)
    try:
        publish(bundle, tmp_path / "models", "m")
    finally:
        os.umask(before)
    assert (tmp_path / "models" / "m").stat().st_mode & 0o777 == 0o755


def test_model_that_cannot_be_published_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "digits-cnn").write_text("")
    config = compose_config([f"publish={tmp_path}/models", f"run_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"publish=.*: digits-cnn in it is no directory"):
        open_run_directory(config)
    assert not (tmp_path / "run").exists()
