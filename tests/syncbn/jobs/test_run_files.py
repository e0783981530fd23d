"""What the dispatcher writes for the trainer, and reads of what the trainer wrote, whole or not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn.errors import ConfigError, JobError, SubmissionError
from syncbn.jobs.dispatch.run_files import RunFiles
from syncbn.jobs.dispatch.runs import Outcome
from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.states import State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace
from syncbn.train.run.directory import Result
from syncbn.train.schema import Device


class Files:
    """A store with one job, which is moved by hand, and its files."""

    def __init__(self, directory: Path, catalog: Catalog) -> None:
        self.models = directory / "models"
        self.store = Store(directory / "jobs")
        self.ledger = Ledger(self.store)
        self.files = RunFiles(directory / "jobs", catalog, self.models)
        self._catalog = catalog

    def begin(self, **submission: Any) -> Job:
        """Submit a job, and bring it to where its files are to be made."""
        given: dict[str, Any] = {"name": "job", "values": {"epochs": 3, "launch.nproc": 1}}
        (job,) = self.store.submit(self._catalog.check(given | submission), owner="anna")
        return self.again(self.ledger.move(job, State.queued, None, "", device="cpu"))

    def again(self, job: Job, **columns: Any) -> Job:
        """Bring a job to its next attempt."""
        if job.state != State.queued:
            job = self.ledger.move(job, State.queued, None, "")
        return self.ledger.move(
            job, State.starting, None, "", attempt=job.attempt + 1, placement={}, **columns
        )

    def workspace(self, job: Job) -> Workspace:
        return Workspace.of_job(self.store.directory, job.id)

    def finish(self, job: Job, epochs: int = 3) -> Job:
        """Leave what a run leaves that has finished."""
        run = self.workspace(job).run
        for epoch in range(1, epochs + 1):
            run.append_metrics({"step": 10 * epoch, "epoch": epoch, "val_loss": 1 / epoch})
        run.begin_attempt(epochs)
        run.write_result(Result("finished", None, {}, 1.0, 0, objective=0.25))
        run.bundle_dir.mkdir(exist_ok=True)
        (run.bundle_dir / "bundle.json").write_text(json.dumps({"name": "job", "of": job.id}))
        (run.bundle_dir / "model.safetensors").write_bytes(b"weights")
        return self.ledger.move(job, State.finished, "finished", "")


@pytest.fixture
def there(tmp_path: Path, catalog: Catalog) -> Iterator[Files]:
    made = Files(tmp_path, catalog)
    yield made
    made.store.close()


def test_first_attempt_gets_a_directory_that_says_all(there: Files) -> None:
    job = there.begin(cores=4)
    there.files.prepare(job)
    workspace = there.workspace(job)
    config = workspace.run.read_config()
    assert (config.epochs, config.name, config.launch.nproc) == (3, "job", 1)
    assert (config.launch.threads, config.launch.device, config.publish) == (4, Device.cpu, None)
    assert workspace.allowed() == 1
    assert there.files.is_free(job)
    assert there.files.outcome(job) == Outcome(None, None)


def test_first_attempt_has_what_was_asked_for_before_it(there: Files) -> None:
    job = there.again(there.begin(), arguments={"epochs": 5})
    there.files.prepare(job)
    assert there.workspace(job).run.read_config().epochs == 5


def test_job_ends_where_nobody_can_tell_what_it_published(
    there: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    job = there.begin(publish="digits")
    there.files.prepare(job)
    monkeypatch.setattr("syncbn.jobs.dispatch.run_files.published_version", fail)
    assert there.files.published(job) == []


def test_job_that_is_published_goes_where_the_server_says(there: Files) -> None:
    job = there.begin(publish="digits")
    there.files.prepare(job)
    config = there.workspace(job).run.read_config()
    assert (config.name, config.publish) == ("digits", str(there.models))


def test_another_attempt_goes_on_with_the_same_configuration(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    run = there.workspace(job).run
    config = run.config_file.read_bytes()
    run.begin_attempt(3)
    run.write_result(Result("failed", "rank 1 was killed", {}, 1, 1, reason="rank_killed"))
    assert there.files.outcome(job).result is not None
    job = there.again(job)
    assert there.files.outcome(job) == Outcome(None, None)  # what is there is of the one before
    there.files.prepare(job)
    assert run.config_file.read_bytes() == config
    assert run.read_result() is None
    assert [attempt.reason for attempt in run.read_attempts()] == ["rank_killed"]
    assert there.workspace(job).allowed() == 2


def test_extension_changes_what_was_asked_for_alone(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    run = there.workspace(job).run
    before = run.read_config()
    job = there.finish(job)
    there.files.check(job, {"epochs": 5})
    job = there.again(job, arguments={"epochs": 5})
    there.files.prepare(job)
    after = run.read_config()
    assert after.epochs == 5
    after.epochs = before.epochs
    assert after == before


def test_extension_that_adds_nothing_is_refused(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    for arguments in ({}, {"epochs": 3}, {"epochs": 2}):
        with pytest.raises(ConfigError, match="adds nothing to it: ask for more epochs"):
            there.files.check(job, arguments)


def test_what_may_not_change_in_a_run_is_refused(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    with pytest.raises(ConfigError, match=r"launch\.nproc"):
        there.files.check(there.finish(job), {"launch.nproc": 2})


def test_job_that_is_not_offered_any_more_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[data.ours]\nkind = "folder"\npath = "nowhere"\n')
    before = Files(tmp_path, Catalog(JobSettings.read(tmp_path)))
    job = before.begin(choices={"data": "ours"})
    files = RunFiles(before.store.directory, Catalog(), None)
    with pytest.raises(SubmissionError, match="data=ours"):
        files.prepare(job)
    with pytest.raises(SubmissionError, match="no directory of models"):
        files.prepare(before.begin(publish="digits"))
    before.store.close()


def test_attempt_that_is_not_prepared_may_not_run(there: Files, tmp_path: Path) -> None:
    job = there.begin()
    there.files.revoke(job)  # of a job without any files
    there.files.prepare(job)
    there.files.revoke(job)
    assert there.workspace(job).allowed() == 0
    there.workspace(job).run.begin_attempt(3)
    assert there.files.outcome(job).progress is not None  # whose word it is stays known


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", "3", '{"status": "finished"', "[" * 100_000, "\0\0\0"]
)
def test_files_that_are_cut_short_or_damaged_say_nothing(there: Files, content: str) -> None:
    job = there.begin()
    there.files.prepare(job)
    run = there.workspace(job).run
    run.result_file.write_text(content)
    (run.path / "status.json").write_text(content)
    run.metrics_file.write_text(f"{content}\n")
    assert there.files.outcome(job) == Outcome(None, None)
    run.result_file.unlink()
    run.begin_attempt(3)
    progress = there.files.outcome(job).progress
    assert progress is not None
    assert progress["metrics"] == {}


def test_progress_has_the_last_whole_line_of_metrics(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    run = there.workspace(job).run
    run.begin_attempt(3)
    lines = [json.dumps({"step": step, "epoch": step, "val_loss": 0.5}) for step in range(5000)]
    run.metrics_file.write_text("\n".join([*lines, '{"step": 5000, "ep']))
    progress = there.files.outcome(job).progress
    assert progress is not None
    assert progress["metrics"] == {"step": 4999, "epoch": 4999, "val_loss": 0.5}


def test_bundle_is_published_under_its_name_and_under_another(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    assert there.files.publish(job, "job") == {"model": "job", "version": 1}
    assert there.files.publish(job, "digits") == {"model": "digits", "version": 1}
    assert there.files.publish(job, "digits") == {"model": "digits", "version": 1}  # no second one
    copies = [there.models / name / "1" for name in ("job", "digits")]
    names = [json.loads((copy / "bundle.json").read_text())["name"] for copy in copies]
    assert names == ["job", "digits"]
    assert all((copy / "model.safetensors").read_bytes() == b"weights" for copy in copies)
    left = {file.name for file in there.workspace(job).directory.iterdir()}
    assert left == {"run", "attempt"}


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", "null"])
def test_job_without_a_whole_bundle_is_not_published(there: Files, manifest: str | None) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    file = there.workspace(job).run.bundle_dir / "bundle.json"
    if manifest is None:
        file.unlink()
    else:
        file.write_text(manifest)
    with pytest.raises(JobError, match=f"job {job.id} could not be published as digits: "):
        there.files.publish(job, "digits")
    assert not list(there.models.glob("digits/[0-9]*"))


def test_what_keeps_a_model_from_being_published_is_said_without_where_it_lies(
    there: Files,
) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    there.models.mkdir()
    (there.models / "digits").touch()
    with pytest.raises(JobError, match=r"could not be published as digits: .*File exists") as told:
        there.files.publish(job, "digits")
    assert "work" not in str(told.value)


def test_dispatcher_without_models_publishes_nothing(there: Files, catalog: Catalog) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    files = RunFiles(there.store.directory, catalog, None)
    with pytest.raises(JobError, match="does not know where models are served from"):
        files.publish(job, "digits")
    assert files.published(job) == []


def test_what_the_trainer_published_is_found(there: Files) -> None:
    job = there.begin(publish="job")
    there.files.prepare(job)
    job = there.finish(job)
    assert there.files.published(job) == []
    there.files.publish(job, "job")
    assert there.files.published(job) == [{"model": "job", "version": 1}]


def test_discarded_job_keeps_all_but_its_checkpoints(there: Files) -> None:
    job = there.begin()
    there.files.prepare(job)
    job = there.finish(job)
    run = there.workspace(job).run
    run.checkpoints_dir.mkdir()
    (run.checkpoints_dir / "step-10").write_bytes(b"state")
    for _ in range(2):
        there.files.discard(job)
    assert not run.checkpoints_dir.exists()
    assert len(run.read_metrics()) == 3
    assert run.bundle_dir.is_dir()
