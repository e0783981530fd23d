import json
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from syncbn.jobs.states import State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from tests.service.jobs.conftest import Shop
from tests.support.processes import run
from tests.support.serving import Service, served

TIMEOUT_S = 30


@dataclass
class Event:
    """A server-sent event as it was read."""

    kind: str = ""
    id: str = ""
    data: Any = None
    comments: list[str] = field(default_factory=list[str])


def read_events(response: httpx2.Response) -> Iterator[Event]:
    event, deadline = Event(), time.monotonic() + TIMEOUT_S
    for line in response.iter_lines():
        assert time.monotonic() < deadline  # seen with the next comment, that the stream lives
        name, _, value = line.partition(": ")
        if not line:
            yield event
            event = Event()
        elif name == "event":
            event.kind = value
        elif name == "id":
            event.id = value
        elif name == "data":
            event.data = json.loads(value)
        else:
            event.comments.append(value)


@contextmanager
def stream(service: Service, path: str, last_id: str = "") -> Generator[Iterator[Event]]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with httpx2.stream("GET", service.url + path, headers=headers, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read_events(response)


def take(events: Iterator[Event], kind: str, count: int = 1) -> list[Event]:
    """Return the next events of a kind, and pass over the others."""
    found: list[Event] = []
    while len(found) < count:
        event = next(events)
        assert event.kind != "error", event
        if event.kind == kind:
            found.append(event)
    return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Service, Shop]]:
    """A service whose jobs the tests move themselves."""
    directory = tmp_path_factory.mktemp("service")
    store = Store(directory / "jobs")
    shop = Shop(directory / "jobs", store, Ledger(store))
    options = ("--jobs", str(shop.directory), "--no-dispatcher", "--max-streams", "3")
    with served(directory / "models", directory / "log", *options) as service:
        yield service, shop
    store.close()


def test_job_is_told_whole_and_then_what_is_new(running: tuple[Service, Shop]) -> None:
    service, shop = running
    job = shop.submit(name="told")
    shop.measure(job, {"step": 1}, {"step": 2})
    shop.print(job, "before\n")
    with stream(service, f"/v1/jobs/{job.id}/events") as events:
        (state,) = take(events, "state")
        assert (state.data["id"], state.data["state"]) == (job.id, "submitted")
        assert [each.data["step"] for each in take(events, "metrics", 2)] == [1, 2]
        assert take(events, "log")[0].data == {"offset": 0, "text": "before\n"}
        job = shop.move(job, State.running)
        assert take(events, "state")[0].data["state"] in ("queued", "starting", "running")
        shop.ledger.note_progress({job.id: {"phase": "training", "step": 3, "total_steps": 30}})
        (progress,) = take(events, "progress")
        assert progress.data["id"] == job.id
        assert progress.data["progress"]["fraction"] == 0.1
        shop.measure(job, {"step": 3, "val_loss": float("nan")})
        assert take(events, "metrics")[0].data == {"step": 3, "val_loss": None}
        shop.print(job, "ä\n")
        assert take(events, "log")[0].data == {"offset": 7, "text": "ä\n"}


def test_stream_until_the_end_of_a_job_tells_all_and_ends(running: tuple[Service, Shop]) -> None:
    service, shop = running
    job = shop.submit(name="ended")
    path = f"/v1/jobs/{job.id}/events"
    with stream(service, f"{path}?until=end") as events:
        take(events, "state")
        job = shop.move(job, State.running)
        shop.measure(job, {"step": 1})
        lines = "one line\n" * 20_000  # several pieces
        shop.print(job, lines)
        shop.move(job, State.finished)
        *told, end = events
    assert (end.kind, end.data) == ("end", {"state": "finished"})
    assert [each.data["step"] for each in told if each.kind == "metrics"] == [1]
    assert "".join(each.data["text"] for each in told if each.kind == "log") == lines
    with stream(service, f"{path}?until=end", end.id) as events:
        assert [each.kind for each in events] == ["end"]
    with stream(service, path, end.id) as events:  # whoever may have it go on
        shop.print(job, "and on\n")
        assert take(events, "log")[0].data["text"] == "and on\n"
    assert "until" in service.ask("GET", f"{path}?until=never").json()["error"]


def test_stream_goes_on_after_the_last_event_that_was_read(running: tuple[Service, Shop]) -> None:
    service, shop = running
    job = shop.submit(name="resumed")
    shop.measure(job, *({"step": step} for step in range(1, 6)))
    shop.print(job, "one\n")
    path = f"/v1/jobs/{job.id}/events"
    with stream(service, path) as events:
        last = take(events, "metrics", 3)[-1].id
    shop.measure(job, {"step": 6})
    with stream(service, path, last) as events:
        assert [each.data["step"] for each in take(events, "metrics", 3)] == [4, 5, 6]
        (log,) = take(events, "log")
        assert log.data["text"] == "one\n"
    shop.print(job, "two\n")
    with stream(service, path, log.id) as events:
        first = next(events)
        assert (first.kind, first.data) == ("log", {"offset": 4, "text": "two\n"})


def test_metrics_that_are_written_anew_are_told_anew(running: tuple[Service, Shop]) -> None:
    service, shop = running
    job = shop.submit(name="again")
    shop.measure(job, {"step": 1}, {"step": 2})
    with stream(service, f"/v1/jobs/{job.id}/events") as events:
        take(events, "metrics", 2)
        run_path = shop.workspace(job).run.path
        (run_path / "new").write_text('{"step": 1}\n{"step": 2, "again": true}\n')
        (run_path / "new").replace(run_path / "metrics.jsonl")
        assert take(events, "metrics", 2)[-1].data == {"step": 2, "again": True}


def test_line_of_metrics_without_end_keeps_no_other_from_being_told(
    running: tuple[Service, Shop],
) -> None:
    service, shop = running
    job = shop.submit(name="long")
    shop.measure(job, {"step": "x" * 200_000}, {"step": 2})
    with stream(service, f"/v1/jobs/{job.id}/events") as events:
        assert take(events, "metrics")[0].data == {"step": 2}


@pytest.mark.parametrize("path", ["/v1/events", "/v1/jobs/{}/events"])
def test_stream_from_an_event_that_is_not_yet_begins_with_the_next(
    running: tuple[Service, Shop], path: str
) -> None:
    service, shop = running
    job = shop.submit(name="restored")
    last_id = "999999" if path == "/v1/events" else "999999.0.0"
    with stream(service, path.format(job.id), last_id) as events:
        time.sleep(0.5)  # so that it has looked once
        shop.move(job, State.running)
        assert take(events, "state")[0].data["id"] == job.id


def test_log_that_is_long_is_told_from_its_end(running: tuple[Service, Shop]) -> None:
    service, shop = running
    job = shop.submit(name="long")
    shop.print(job, "x" * 300_000 + "end\n")
    with stream(service, f"/v1/jobs/{job.id}/events") as events:
        (log,) = take(events, "log")
        assert log.data["offset"] == 300_004 - (1 << 16)
        shop.print(job, "y" * 200_000)
        text = "".join(each.data["text"] for each in take(events, "log", 4))
        assert text == "y" * 200_000


def test_all_jobs_are_followed_from_where_a_list_was_read(running: tuple[Service, Shop]) -> None:
    service, shop = running
    last = service.ask("GET", "/v1/jobs").json()["last_event"]
    job = shop.submit(name="followed")
    with stream(service, "/v1/events", last) as events:
        (first,) = take(events, "state")
        assert (first.data["name"], first.data["state"]) == ("followed", "submitted")
        shop.move(job, State.running)
        shop.ledger.note_progress({job.id: {"phase": "training", "step": 1, "total_steps": 2}})
        while (state := take(events, "state")[0]).data["state"] != "running":
            assert state.data["id"] == job.id
        told = take(events, "progress")[0]
        while told.data["id"] != job.id:
            told = take(events, "progress")[0]
        assert told.data["progress"]["step"] == 1
    other = shop.submit(name="later")
    with stream(service, "/v1/events", state.id) as events:
        assert take(events, "state")[0].data["id"] == other.id
    with stream(service, "/v1/events") as events:
        newest = shop.submit(name="newest")
        assert take(events, "state")[0].data["id"] == newest.id  # and nothing before


def test_more_streams_than_allowed_are_refused_and_those_that_end_make_room(
    running: tuple[Service, Shop],
) -> None:
    service, _ = running
    with stream(service, "/v1/events"), stream(service, "/v1/events"):
        with stream(service, "/v1/events"):
            answer = service.ask("GET", "/v1/events")
            assert answer.status_code == 429
            assert "3 streams of events are open" in answer.json()["error"]
            assert service.ask("GET", "/v1/jobs").status_code == 200
        deadline = time.monotonic() + TIMEOUT_S
        while True:  # the service learns a little later that a client has gone
            with httpx2.stream("GET", f"{service.url}/v1/events", timeout=TIMEOUT_S) as again:
                if again.status_code == 200:
                    break
            assert time.monotonic() < deadline


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_streams_end_when_the_service_is_told_to_stop(tmp_path: Path, workers: str) -> None:
    options = ("--jobs", str(tmp_path / "jobs"), "--no-dispatcher", "--workers", workers)
    # The answers under way would have a minute.
    with served(tmp_path / "models", tmp_path / "log", *options, "--timeout-s", "60") as service:
        with stream(service, "/v1/events") as events:
            service.process.send_signal(signal.SIGTERM)
            assert list(events) == []
        assert service.process.wait(TIMEOUT_S) in (0, -signal.SIGTERM)
    assert "graceful shutdown exceeded" not in (tmp_path / "log").read_text()
    assert '"level":"error"' not in (tmp_path / "log").read_text()


def test_failing_store_is_the_last_event_of_a_stream(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    options = ("--jobs", str(jobs), "--no-dispatcher")
    with served(tmp_path / "models", tmp_path / "log", *options) as service:
        with stream(service, "/v1/events") as events:
            (jobs / "broken").write_bytes(b"no database" * 1000)
            for name in ("jobs.sqlite-wal", "jobs.sqlite-shm"):
                (jobs / name).unlink()
            (jobs / "broken").rename(jobs / "jobs.sqlite")
            *_, last = events
            assert last.kind == "error"
            assert "the file is damaged" in last.data["error"]
        assert service.ask("GET", "/v1/events").status_code == 503
        assert service.ask("GET", "/v2/models").status_code == 200


def test_single_bundle_and_jobs_do_not_go_together(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "--models", str(models / "one"), "--port", "0"]
    result = run([*command, "--jobs", "jobs"], tmp_path)
    assert result.returncode == 1
    assert "is a bundle, and jobs publish theirs beside others" in result.stdout
