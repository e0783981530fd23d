"""Files of ended jobs go by age, number and size, and never those of published models."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn.jobs.dispatch.retention import expired, size_of, tidy
from syncbn.jobs.job import Footprint, Job
from syncbn.jobs.offer.settings import Retention
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace

_NOW = 1_800_000_000.0
_DAY_S = 86_400.0
_EVERYTHING_GOES = Retention(jobs=0)


class Kept:
    """A store of jobs that have ended, with files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.store = Store(directory, lambda: _NOW)
        self.ledger = Ledger(self.store, lambda: _NOW)

    def add(
        self,
        size_bytes: int = 10,
        state: State = State.finished,
        ended: float = _NOW,
        published: list[dict[str, Any]] | None = None,
    ) -> Job:
        (job,) = self.store.submit([JobSpec(name="job")], owner="anna")
        job = self.ledger.move(job, State.queued, None, "")
        job = self.ledger.move(job, State.starting, None, "")
        job = self.ledger.move(job, State.running, None, "")
        if state != State.running:
            job = self.ledger.move(job, state, None, "", ended=ended, published=published or [])
        workspace = Workspace.of_job(self.root, job.id)
        workspace.run.bundle_dir.mkdir(parents=True)
        (workspace.run.bundle_dir / "weights").write_bytes(b"x" * size_bytes)
        return job

    def footprints(self, *jobs: Job) -> list[Footprint]:
        found = {each.id: each for each in self.ledger.footprints()}
        return [found[job.id] for job in jobs]

    def tidy(self, keep: Retention) -> None:
        tidy(self.ledger, self.root, keep, _NOW)

    def has_files(self, job: Job) -> bool:
        return Workspace.of_job(self.root, job.id).directory.exists()

    def sizes(self) -> list[int]:
        with self.store.database.reading() as connection:
            rows = connection.execute("SELECT size_bytes FROM jobs ORDER BY number")
            return [row[0] for row in rows]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize(
    ("keep", "removed"),
    [
        (Retention(), []),
        (Retention(days=2.5), [3, 4]),  # of jobs that ended 0, 1, 2, 3 and 4 days ago
        (Retention(jobs=2), [2, 3, 4]),
        (Retention(jobs=0), [0, 1, 2, 3, 4]),
        (Retention(disk_bytes=35), [3, 4]),
        (Retention(disk_bytes=9), [0, 1, 2, 3, 4]),
        (Retention(days=3.5, jobs=4, disk_bytes=25), [2, 3, 4]),
    ],
)
def test_the_newest_are_kept(kept: Kept, keep: Retention, removed: list[int]) -> None:
    jobs = [kept.add(ended=_NOW - days * _DAY_S) for days in range(5)]
    footprints = kept.footprints(*jobs)
    gone = expired(footprints[::-1], [10] * 5, keep, _NOW)
    assert sorted(footprints.index(job) for job in gone) == removed


def test_small_older_job_is_kept_where_a_large_one_is_not(kept: Kept) -> None:
    large, small = kept.footprints(kept.add(ended=_NOW), kept.add(ended=_NOW - 1))
    assert expired([large, small], [100, 10], Retention(disk_bytes=50), _NOW) == [large]


def test_published_job_is_never_removed_and_takes_nobodys_place(kept: Kept) -> None:
    published: list[dict[str, Any]] = [{"model": "digits", "version": 1}]
    old = kept.add(ended=_NOW - 1000 * _DAY_S, published=published)
    new = kept.add()
    kept.tidy(Retention(days=1, jobs=1, disk_bytes=15))
    assert kept.has_files(old)
    assert kept.has_files(new)
    kept.tidy(_EVERYTHING_GOES)
    assert kept.has_files(old)
    assert not kept.has_files(new)


def test_removed_job_is_put_away_and_says_why_once(kept: Kept) -> None:
    job = kept.add()
    for _ in range(3):
        kept.tidy(_EVERYTHING_GOES)
    assert kept.store.get(job.id).archived
    notes = [event for event in kept.store.events_after(0, job=job.id) if event.kind == "note"]
    assert len(notes) == 1
    assert "as the rules for ended jobs say" in notes[0].data["text"]


def test_files_that_cannot_be_removed_are_tried_again_without_another_word(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = kept.add()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *_, **__: None)
        kept.tidy(_EVERYTHING_GOES)
        kept.tidy(_EVERYTHING_GOES)
    assert kept.has_files(job)
    kept.tidy(_EVERYTHING_GOES)
    assert not kept.has_files(job)
    assert len([e for e in kept.store.events_after(0, job=job.id) if e.kind == "note"]) == 1


@pytest.mark.parametrize("state", [State.running, State.queued])
def test_job_that_has_not_ended_keeps_its_files(kept: Kept, state: State) -> None:
    job = kept.add(state=State.running)
    if state == State.queued:
        kept.ledger.move(job, State.queued, None, "")
    kept.tidy(_EVERYTHING_GOES)
    assert kept.has_files(job)


def test_job_whose_processes_are_there_keeps_its_files(kept: Kept) -> None:
    job = kept.add(state=State.lost)
    with Workspace.of_job(kept.root, job.id).run.lock():
        kept.tidy(_EVERYTHING_GOES)
        assert kept.has_files(job)
    kept.tidy(_EVERYTHING_GOES)
    assert not kept.has_files(job)


def test_sizes_of_all_jobs_are_noted(kept: Kept) -> None:
    kept.add(10)
    grows = kept.add(20, State.running)
    kept.add(30)
    kept.tidy(Retention())
    assert kept.sizes() == [10, 20, 30]
    (Workspace.of_job(kept.root, grows.id).run.bundle_dir / "more").write_bytes(b"x" * 5)
    kept.tidy(Retention(disk_bytes=30))
    assert kept.sizes() == [0, 25, 30]


def test_size_is_that_of_files_and_not_of_what_links_point_at(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 10_000)
    (tmp_path / "job" / "deep").mkdir(parents=True)
    (tmp_path / "job" / "deep" / "file").write_bytes(b"x" * 10)
    link = tmp_path / "job" / "link"
    link.symlink_to(tmp_path / "large")
    assert size_of(tmp_path / "job") == 10 + link.lstat().st_size
    assert size_of(tmp_path / "nowhere") == 0


def test_job_that_never_said_when_it_ended_is_not_old() -> None:
    job = Footprint("a", 1, State.finished, archived=False, ended=None, is_published=False)
    assert expired([job], [1], Retention(days=1), _NOW) == []


def test_many_jobs_need_little_memory_at_a_time(kept: Kept) -> None:
    kept.store.submit([JobSpec(name="job", values={"optim.lr": 0.1})] * 2000, owner="anna")
    tracemalloc.start()
    try:
        kept.tidy(Retention())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes / 2000 < 500
