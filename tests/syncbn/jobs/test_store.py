"""What is stored stays, all or none of it, for any number of threads and processes."""

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from syncbn.errors import (
    JobActionError,
    JobLimitError,
    JobNotFoundError,
    JobStoreError,
    SubmissionError,
)
from syncbn.jobs.spec import JobSpec
from syncbn.jobs.states import Action, State
from syncbn.jobs.store.database import FILE
from syncbn.jobs.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.close()


def _specs(count: int, **values: object) -> list[JobSpec]:
    return [JobSpec.from_json({"name": f"job-{index}", **values}) for index in range(count)]


def test_submission_outlasts_the_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (job,) = store.submit(_specs(1, retries=3), owner="anna")
    store.close()
    found = Store(tmp_path).get(job.id)
    assert found == job
    assert (found.state, found.owner, found.spec.retries) == (State.submitted, "anna", 3)


def test_submission_is_stored_whole_or_not_at_all(store: Store) -> None:
    store.submit(_specs(3), owner="anna", max_waiting=5)
    with pytest.raises(JobLimitError, match="3 jobs of anna wait already, and at most 5 may"):
        store.submit(_specs(3), owner="anna", max_waiting=5)
    assert store.select().total == 3
    store.submit(_specs(3), owner="ben", max_waiting=5)


def test_sweep_holds_its_jobs(store: Store) -> None:
    jobs = store.submit(_specs(3), owner="anna", sweep_name="seeds")
    assert jobs[0].sweep is not None
    assert store.sweep(jobs[0].sweep).name == "seeds"
    assert store.select(sweep=jobs[0].sweep).total == 3
    with pytest.raises(JobNotFoundError):
        store.sweep("none")


def test_repeated_submission_makes_no_second_job(store: Store) -> None:
    first = store.submit(_specs(2), owner="anna", idempotency_key="k")
    again = store.submit(_specs(2), owner="anna", idempotency_key="k")
    assert [job.id for job in again] == [job.id for job in first]
    with pytest.raises(SubmissionError, match="was used for another submission"):
        store.submit(_specs(1), owner="anna", idempotency_key="k")
    assert store.submit(_specs(2), owner="ben", idempotency_key="k")[0].id != first[0].id


def test_pages_show_each_job_once_while_new_ones_come(store: Store) -> None:
    store.submit(_specs(25), owner="anna")
    seen: list[int] = []
    cursor = None
    while True:
        page = store.select(cursor=cursor, limit=10)
        seen += [job.number for job in page.jobs]
        store.submit(_specs(1), owner="anna")
        cursor = page.next
        if cursor is None:
            break
    assert seen == list(range(25, 0, -1))


@pytest.mark.parametrize("cursor", ["", "-1", "1.5", "x", "9" * 30, "٣"])
def test_cursor_that_is_none_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(SubmissionError, match="cursor"):
        store.select(cursor=cursor)


def test_jobs_are_found_by_what_is_known_of_them(store: Store) -> None:
    (a,) = store.submit([JobSpec(name="alpha", choices={"norm": "sync"})], owner="anna")
    (b,) = store.submit([JobSpec(name="beta_50%")], owner="ben")
    assert [job.id for job in store.select(text="norm").jobs] == [b.id, a.id][1:]
    assert [job.id for job in store.select(text="50%").jobs] == [b.id]
    assert store.select(text="a_5").total == 1
    assert store.select(text="l_h").total == 0  # no wildcard
    assert [job.id for job in store.select(owner="ben").jobs] == [b.id]
    assert [job.id for job in store.select(name="alpha").jobs] == [a.id]
    assert store.select(states=[State.running]).total == 0
    assert store.counts() == {"submitted": 2}


def test_request_that_the_state_does_not_allow_says_what_it_does(store: Store) -> None:
    (job,) = store.submit(_specs(1), owner="anna")
    with pytest.raises(JobActionError, match="is submitted: publish is for jobs that are finished"):
        store.request(job.id, Action.publish, by="anna")
    with pytest.raises(JobNotFoundError, match="there is no job 'x'"):
        store.request("x", Action.cancel, by="anna")


def test_same_request_twice_is_one(store: Store) -> None:
    (job,) = store.submit(_specs(1), owner="anna")
    for _ in range(2):
        assert store.request(job.id, Action.cancel, by="anna").wanted == State.cancelled
    kinds = [event.kind for event in store.events_after(0, job=job.id)]
    assert kinds == ["state", "request"]


def test_what_must_last_waits_for_the_disk_whatever_was_written_before(store: Store) -> None:
    for is_lasting, expected in ((True, 2), (False, 1), (True, 2)):  # FULL and NORMAL of SQLite
        with store.database.writing(is_lasting=is_lasting) as connection:
            assert connection.execute("PRAGMA synchronous").fetchone()[0] == expected


@pytest.mark.parametrize("statement", ["UPDATE events SET data = '{}'", "DELETE FROM events"])
def test_events_are_never_rewritten(store: Store, statement: str) -> None:
    store.submit(_specs(1), owner="anna")
    with (
        pytest.raises(JobStoreError, match="events are never re"),
        store.database.writing() as connection,
    ):
        connection.execute(statement)
    assert store.last_event() == 1


def test_threads_share_a_store(store: Store) -> None:
    failures: list[Exception] = []

    def work(owner: str) -> None:
        try:
            for _ in range(20):
                (job,) = store.submit(_specs(1), owner=owner)
                store.request(job.id, Action.cancel, by=owner)
                store.select(owner=owner)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"owner-{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert store.select().total == 160


def test_submissions_that_come_together_share_a_write(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[str] = []
    writes: list[int] = []
    writing = store.database.writing

    @contextmanager
    def counted() -> Generator[sqlite3.Connection]:
        with writing() as connection:
            yield connection
            writes.append(1)
            deadline = time.monotonic() + 60
            while len(writes) == 1 and waiting() < 7:  # the disk takes its time
                assert time.monotonic() < deadline
                time.sleep(0.001)

    def waiting() -> int:
        return len(store._writes._waiting)  # pyright: ignore[reportPrivateUsage] -- who has come

    def submit(owner: str) -> None:
        try:
            (job,) = store.submit(_specs(1), owner=owner, max_waiting=2)
            outcomes.append(store.get(job.id).owner)
        except JobLimitError:
            outcomes.append("refused")

    monkeypatch.setattr(store.database, "writing", counted)
    threads = [
        threading.Thread(target=submit, args=("anna" if index else "ben",)) for index in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(writes) == 2
    assert sorted(outcomes) == ["anna"] * 2 + ["ben"] + ["refused"] * 5
    assert store.select().total == 3
    assert store.last_event() == 3  # nothing is left of those that were refused


def test_submissions_that_share_a_write_fail_together_if_that_does(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def fail(*unused: object) -> NoReturn:
            raise sqlite3.OperationalError("disk I/O error")

        patched.setattr("syncbn.jobs.store.store._insert", fail)
        with pytest.raises(JobStoreError, match="disk I/O error"):
            store.submit(_specs(1), owner="anna")
    assert store.select().total == 0
    store.submit(_specs(1), owner="anna")


def _submit_many(directory: Path, owner: str) -> None:
    store = Store(directory)
    for _ in range(25):
        store.submit(_specs(1), owner=owner)
    store.close()


def test_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_submit_many, args=(tmp_path, f"owner-{index}"))
        for index in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = Store(tmp_path)
    assert store.select().total == 100
    assert sorted(job.number for job in store.select(limit=500).jobs) == list(range(1, 101))
    store.close()


def test_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database " * 100)
    with pytest.raises(JobStoreError, match="the file is damaged: stop the service, move it"):
        Store(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_store_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    kept: list[JobStoreError] = []  # with the frames in which they were raised
    for _ in range(2):
        with pytest.raises(JobStoreError) as raised:
            Store(tmp_path)
        kept.append(raised.value)
    opened = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists()]
    assert not [file for file in opened if file.startswith(str(tmp_path))]


def test_full_disk_says_so_and_leaves_the_store_whole(store: Store) -> None:
    store.submit(_specs(1), owner="anna")
    with store.database.reading() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JobStoreError, match="full: make room"):
        store.submit(_specs(2000), owner="anna")
    assert store.select().total == 1
    with store.database.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    store.submit(_specs(1), owner="anna")


def test_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(JobStoreError, match="which a later syncbn wrote"):
        Store(tmp_path)


def test_store_that_another_keeps_locked_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncbn.jobs.store.database._BUSY_TIMEOUT_S", 0.1)
    store = Store(tmp_path)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JobStoreError, match="another process has kept it for too long"):
        store.submit(_specs(1), owner="anna")
    assert store.select().total == 0  # reading goes on
    other.execute("ROLLBACK")
    store.submit(_specs(1), owner="anna")
    other.close()
    store.close()


def test_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobStoreError, match="cannot make"):
        Store(tmp_path / "file" / "jobs")
