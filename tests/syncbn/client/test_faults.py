"""What goes wrong between a client and its service, and what the client says of it."""

import socket
from contextlib import closing
from typing import Any

import pytest

from syncbn.client import JobsClient
from syncbn.client.server import Server
from syncbn.errors import ServerError, SubmissionError
from tests.support.fake_jobs import BREAK, FakeJobs, Fault, event, job_json, never_ending, serving

HTML = {"Content-Type": "text/html"}


def test_reading_is_repeated_when_the_service_is_busy_or_breaks_off(
    client: Any, fake: FakeJobs
) -> None:
    job_id = fake.add()
    fake.faults.extend([BREAK, Fault(503), Fault(429, headers={"Retry-After": "0"})])
    assert client.show(job_id).id == job_id
    assert len(fake.sent) == 4


def test_repetitions_are_limited(client: Any, fake: FakeJobs) -> None:
    fake.faults.extend([Fault(503, b'{"error": "the store is locked"}')] * 9)
    with pytest.raises(ServerError, match=r"^the store is locked$") as raised:
        client.show(fake.add())
    assert raised.value.status == 503
    assert len(fake.sent) == 4


def test_action_is_sent_once_and_its_error_says_that_it_may_have_happened(
    client: Any, fake: FakeJobs
) -> None:
    fake.faults.append(BREAK.late())
    with pytest.raises(ServerError, match="Whether it did what was asked is not known: look at"):
        client.cancel(fake.add())
    assert len(fake.sent) == 1


def test_limit_is_told_at_once_with_when_to_come_back(client: Any, fake: FakeJobs) -> None:
    said = b'{"error": "20 jobs of anna wait already"}'
    fake.faults.append(Fault(429, said, {"Retry-After": "600"}))
    with pytest.raises(ServerError, match=r"^20 jobs of anna wait already; try again in 600 s$"):
        client.submit()
    fake.faults.append(Fault(429, said))
    with pytest.raises(ServerError, match=r"^20 jobs of anna wait already$"):
        client.submit()
    assert len(fake.sent) == 2


def test_service_that_does_not_run_is_asked_about(client_class: Any) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    said = rf"^no answer from {url}: .+\. Is syncbn-serve running there\?$"
    with client_class(url) as client, pytest.raises(ServerError, match=said) as raised:
        client.cancel("job1")
    assert raised.value.status is None


def test_answer_that_trickles_in_ends_at_the_deadline(
    client_class: Any, url: str, fake: FakeJobs
) -> None:
    fake.faults.extend([Fault(200, b"{" * 1000, delay_s=0.05)] * 9)
    said = r"it took more than 0\.4 s"
    with client_class(url, timeout_s=0.4) as client, pytest.raises(ServerError, match=said):
        client.show("job1")


def test_service_that_never_answers_ends_at_the_deadline(client_class: Any) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with client_class(url, timeout_s=0.2) as client:
            with pytest.raises(ServerError, match=r"it took more than 0\.2 s"):
                client.options()
            with pytest.raises(ServerError, match=r"it took more than 0\.2 s"):
                client.submit()


def test_page_of_a_proxy_is_no_answer_of_the_service(client: Any, fake: FakeJobs) -> None:
    fake.faults.append(Fault(200, b"<html>Please log in</html>", HTML))
    with pytest.raises(ServerError, match=r"with what no service of jobs says: text/html; JSON"):
        client.show("job1")
    fake.faults.extend([Fault(502, b"<html>Bad Gateway</html>", HTML)] * 4)
    with pytest.raises(ServerError, match=r"HTTP 502, text/html\. Is the URL") as raised:
        client.show("job1")
    assert raised.value.status == 502
    fake.faults.append(Fault(200, b"<html>", HTML))
    with pytest.raises(ServerError, match="text/html"):
        next(client.events())
    assert len(fake.sent) == 6


@pytest.mark.parametrize(
    "body", [b'{"kind": "job", "id": "a', b'{"kind": "job"}', b"[]", b"", b'"\xff"']
)
def test_answer_that_is_no_job_is_an_error_that_says_where(
    client: Any, fake: FakeJobs, body: bytes
) -> None:
    fake.faults.append(Fault(200, body, {"Content-Type": "application/json"}))
    with pytest.raises(ServerError, match="answers GET /v1/jobs/job1 with what no service"):
        client.show("job1")
    assert len(fake.sent) == 1


def test_log_without_its_offset_is_no_answer_of_the_service(client: Any, fake: FakeJobs) -> None:
    fake.faults.append(Fault(200, b"text"))
    with pytest.raises(ServerError, match="there is no header 'x-log-offset'"):
        list(client.log("job1"))


def test_service_without_jobs_is_told_from_one_with_them(client: Any, fake: FakeJobs) -> None:
    fake.faults.append(Fault(404, b'{"detail": "Not Found"}'))
    with pytest.raises(ServerError, match="not found; was it started with --jobs"):
        client.options()


def test_text_of_an_error_cannot_write_to_the_terminal(client: Any, fake: FakeJobs) -> None:
    fake.faults.append(Fault(400, rb'{"error": "name=\u001b[2J\n: must be a name"}'))
    with pytest.raises(ServerError, match=r"^name= \[2J : must be a name$"):
        client.submit()


def test_redirections_are_refused_and_the_key_goes_nowhere(
    client_class: Any, url: str, fake: FakeJobs
) -> None:
    other = FakeJobs()
    with serving(other) as target, client_class(url, "secret-key") as client:
        elsewhere = Fault(307, headers={"Location": f"{target}/v1/jobs"})
        fake.faults.extend([elsewhere] * 3)
        for ask in (client.submit, client.options, lambda: next(client.events())):
            with pytest.raises(ServerError, match=rf"sends on to {target}/v1/jobs \(HTTP 307\)"):
                ask()
    assert other.sent == []
    assert len(fake.sent) == 3


def test_key_is_sent_and_a_missing_or_unknown_one_is_explained(
    client_class: Any, url: str, fake: FakeJobs
) -> None:
    fake.key = "a-key"
    with client_class(url, " a-key\n") as client:
        client.options()
    said = "wants a key; give one: key=…, --key-file or"
    with client_class(url) as client, pytest.raises(ServerError, match=said):
        client.options()
    said = "HTTP 401: the key is missing or unknown to"
    with client_class(url, "another") as client, pytest.raises(ServerError, match=said):
        client.options()


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel", "\x00"])
def test_key_that_cannot_be_one_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(SubmissionError, match=r"^the key of \d+ characters is none") as raised:
        JobsClient(key=key)
    assert not key or key not in str(raised.value)


def test_key_is_not_shown() -> None:
    assert "secret" not in repr(Server("http://localhost", "secret"))


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "", "http://", "ftp://host", "http://host:port", "http://h/?key=1", "//h"],
)
def test_urls_that_are_none_of_a_service_are_refused(url: str) -> None:
    with pytest.raises(SubmissionError, match=r"give one such as http://127\.0\.0\.1:8000"):
        JobsClient(url)


def test_password_in_a_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(
        SubmissionError, match=r"^the URL of host holds a user or a password"
    ) as raised:
        JobsClient("http://user:secret@host")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"retries": -1}]
)
def test_manners_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(SubmissionError, match=f"{name}="):
        JobsClient(**options)  # pyright: ignore[reportArgumentType] -- what a user may type


def test_service_may_be_below_a_path(client_class: Any, url: str, fake: FakeJobs) -> None:
    with client_class(f"{url}/train/") as client, pytest.raises(ServerError):
        client.options()
    assert fake.paths() == ["GET /train/v1/options"]


def test_this_machine_is_asked_without_a_proxy(
    client_class: Any, url: str, fake: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with client_class(url) as client:
        client.options()
    assert len(fake.sent) == 1


def test_events_go_on_after_the_last_whole_one_when_the_connection_breaks(
    client: Any, fake: FakeJobs
) -> None:
    job_id = fake.add()
    job, done = fake.jobs[job_id], job_json(1, state="finished")
    torn = event("log", {"offset": 4, "text": "two\n"}, 3)[:-1]
    fake.streams.append(
        [
            event("state", job, 1),
            b": ping\n\n",
            event("log", {"offset": 0, "text": "one\n"}, 2),
            torn,
            None,
        ]
    )
    fake.streams.append([event("of_a_later_service", [1], 3), torn + b"\n"])  # a clean end
    fake.streams.append(
        [
            event("progress", {"id": job_id, "progress": {"step": 3}, "metrics": None}, 5),
            event("metrics", {"val_accuracy": 0.9}, 6),
            event("state", done, 7),
        ]
    )
    rest = [event("log", {"offset": 8, "text": "the end\n"}, 8), event("end", {}, 8)]
    fake.streams.append(never_ending(b"".join(rest)))
    found = list(client.events(job_id))
    assert [each.id for each in found] == ["1", "2", "3", "5", "6", "7", "8"]
    assert [each.text for each in found[1:3]] == ["one\n", "two\n"]
    assert (found[3].job_id, found[3].progress.step) == (job_id, 3)
    assert found[4].metrics == {"val_accuracy": 0.9}
    assert found[5].job.has_ended
    asked = [sent.headers.get("last-event-id") for sent in fake.sent]
    assert asked == [None, "2", "3", "7"]
    assert all(("until", "end") in sent.query for sent in fake.sent)


def test_events_of_a_job_that_has_ended_end_if_it_has_none(client: Any, fake: FakeJobs) -> None:
    fake.streams.append([event("end", {"state": "lost"}, 9)])
    assert list(client.events(fake.add(state="lost"), last_event_id="9")) == []
    assert fake.sent[0].headers["last-event-id"] == "9"


def test_events_of_all_jobs_go_on_after_one_has_ended(client: Any, fake: FakeJobs) -> None:
    fake.streams.append([event("state", job_json(n, state="finished"), n) for n in (1, 2)])
    found = client.events()
    assert [next(found).job.id, next(found).job.id] == ["job1", "job2"]


def test_events_of_an_unknown_job_are_an_error(client: Any) -> None:
    with pytest.raises(ServerError, match="there is no job nobody"):
        next(client.events("nobody"))


def test_event_that_is_none_is_an_error_that_says_which(client: Any, fake: FakeJobs) -> None:
    fake.streams.append([event("log", {"offset": "x"}, 1)])
    with pytest.raises(ServerError, match="an event log; Expected `int`, got `str`"):
        next(client.events())


def test_stream_that_is_left_is_closed(client: Any, fake: FakeJobs) -> None:
    fake.streams.append([event("state", job_json(n), n) for n in range(9)])
    found = client.events()
    next(found)
    found.close()
    assert client.options().groups


def test_wait_is_no_longer_than_it_may_be_for_a_service_that_never_answers(
    client_class: Any,
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = r"it took more than 0\.2 s"
        with client_class(url, timeout_s=600) as client, pytest.raises(ServerError, match=said):
            client.wait("job1", timeout_s=0.2)
