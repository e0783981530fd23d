"""What the clients ask for, and what they make of the answers: the same for both."""

import inspect
from collections import deque
from typing import Any

import pytest

from syncbn.client import AsyncJobsClient, Job, JobsClient, Sweep
from syncbn.errors import JobNotFoundError, JobTimeoutError, ServerError, SubmissionError
from tests.support.fake_jobs import BREAK, FakeJobs, ended, running


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(JobsClient) == methods(AsyncJobsClient)


def test_submission_says_what_is_given_and_nothing_else(client: Any, fake: FakeJobs) -> None:
    job = client.submit(
        name="x", choices={"norm": "sync"}, values={"epochs": 2, "patience": None}, retries=0
    )
    assert isinstance(job, Job)
    assert (job.name, job.choices, job.state) == ("x", {"norm": "sync"}, "queued")
    (sent,) = fake.sent
    assert sent.json == {
        "name": "x",
        "choices": {"norm": "sync"},
        "values": {"epochs": 2, "patience": None},
        "retries": 0,
    }
    assert sent.headers["content-type"] == "application/json"


def test_submission_with_several_values_is_a_sweep_of_jobs(client: Any) -> None:
    sweep = client.submit(sweep={"seed": [1, 2], "norm": ["sync", "local"]})
    assert isinstance(sweep, Sweep)
    assert [job.sweep for job in sweep.jobs] == [sweep.id] * 4
    assert sweep.jobs[1].sweep_values == {"seed": 1, "norm": "local"}


def test_submission_whose_answer_was_lost_is_made_once(client: Any, fake: FakeJobs) -> None:
    fake.faults.append(BREAK.late())
    job = client.submit(name="x")
    assert list(fake.jobs) == [job.id]
    first, again = fake.sent
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]


def test_submissions_have_keys_of_their_own_unless_told(client: Any, fake: FakeJobs) -> None:
    client.submit()
    client.submit()
    client.submit(idempotency_key="nightly")
    keys = [sent.headers["idempotency-key"] for sent in fake.sent]
    assert len(set(keys)) == 3
    assert keys[2] == "nightly"
    assert client.submit(idempotency_key="nightly").id == "job3"


def test_infinite_numbers_are_refused_before_they_become_null(client: Any, fake: FakeJobs) -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(SubmissionError, match=r"optim\.lr=(inf|nan): must be a finite number"):
            client.submit(values={"optim.lr": value})
        with pytest.raises(SubmissionError, match=r"optim\.lr="):
            client.submit(sweep={"optim.lr": [0.1, value]})
    assert fake.sent == []


def test_list_iterates_over_all_pages(client: Any, fake: FakeJobs) -> None:
    ids = [fake.add(owner="anna") for _ in range(5)]
    fake.add(owner="ben")
    assert [job.id for job in client.list(owner="anna", limit=2)] == ids[::-1]
    assert [dict(sent.query).get("cursor") for sent in fake.sent] == [None, "2", "4"]


def test_list_asks_for_states_one_by_one(client: Any, fake: FakeJobs) -> None:
    fake.add()
    wanted = [fake.add(state=state) for state in ("failed", "lost")]
    found = client.page(states=["failed", "lost"], archived=True)
    assert [job.id for job in found.jobs] == wanted[::-1]
    assert (found.total, found.counts["lost"]) == (2, 1)
    assert fake.sent[0].query == [("state", "failed"), ("state", "lost"), ("archived", "true")]


def test_job_tells_its_progress_and_metrics(client: Any, fake: FakeJobs) -> None:
    job = client.show(fake.add(**running(step=12, total=120)))
    assert job.progress.fraction == 0.1
    assert job.metrics == {"val_accuracy": 0.97, "val_loss": 0.1}
    assert not job.has_ended


def test_job_tells_how_it_came_to_where_it_is(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(
        transitions=[
            {"state": "queued", "time": 1.5, "reason_code": None, "reason": "x", "by": "a"}
        ],
        attempts=[
            {"number": 1, "started": 1, "ended": None, "status": "lost", "reason_code": "killed"}
        ],
        config={"optim.lr": 0.05, "model.depths": [2, 2]},
        changed={"optim.lr": {"default": 0.1, "value": 0.05}},
    )
    job = client.show(job_id)
    assert job.transitions[0].by == "a"
    assert job.attempts[0].reason_code == "killed"
    assert job.changed["optim.lr"].default == 0.1


@pytest.mark.parametrize(
    ("action", "becomes"), [("cancel", "cancelled"), ("pause", "paused"), ("retry", "queued")]
)
def test_actions_return_the_job_as_it_is_then(
    client: Any, fake: FakeJobs, action: str, becomes: str
) -> None:
    job_id = fake.add(actions=[action])
    assert getattr(client, action)(job_id).state == becomes
    assert fake.sent[0].json == {}


def test_finished_job_is_resumed_with_new_values(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(**ended("finished") | {"actions": ["resume"]})
    assert client.resume(job_id, {"epochs": 20}).state == "queued"
    assert fake.sent[0].json == {"values": {"epochs": 20}}


def test_finished_job_is_published_and_archived(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(**ended("finished") | {"actions": ["publish", "archive"]})
    assert client.publish(job_id, "digits").published[0].model == "digits"
    assert client.archive(job_id).archived
    assert list(client.list()) == []


def test_action_that_the_state_does_not_allow_is_an_error_that_says_so(
    client: Any, fake: FakeJobs
) -> None:
    with pytest.raises(ServerError, match=r"^a job that is lost cannot do that: pause$") as raised:
        client.pause(fake.add(state="lost", actions=["retry"]))
    assert raised.value.status == 409


def test_log_is_whole_where_its_parts_cut_letters(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(**ended("finished"))
    fake.logs[job_id] = "μ und σ: 0,5 ± 0,1\n".encode() * 3
    fake.log_bytes = 3
    assert "".join(client.log(job_id)) == "μ und σ: 0,5 ± 0,1\n" * 3
    assert "".join(client.log(job_id, offset=1, attempt=2)).startswith("� und")
    assert ("attempt", "2") in fake.sent[-1].query


def test_log_is_followed_until_the_job_has_ended(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(**running())
    fake.logs[job_id] = b"one\n"
    fake.looks[job_id] = deque([{}, {}, ended("finished")])
    parts: list[str] = []
    for part in client.log(job_id, follow=True):
        parts.append(part)
        if len(parts) == 1:
            fake.logs[job_id] += b"two\n"
    assert parts == ["one\n", "two\n"]
    assert not fake.looks[job_id]


def test_log_without_follow_ends_where_the_log_does(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add(**running())
    assert list(client.log(job_id)) == []


def test_metrics_are_lines_of_numbers(client: Any, fake: FakeJobs) -> None:
    (line,) = client.metrics(fake.add(), kind="steps", after=3)
    assert line == {"epoch": 1, "val_accuracy": 0.9, "best": None}
    assert fake.sent[0].query == [("kind", "steps"), ("format", "json"), ("after", "3")]


def test_comparison_tells_what_differs_and_means_over_seeds(client: Any, fake: FakeJobs) -> None:
    ids = [fake.add(), fake.add()]
    found = client.compare(ids, by=["norm", "optim.lr"])
    assert [job.id for job in found.jobs] == ids
    assert found.keys == {"norm": {"job1": "n0", "job2": "n1"}}
    assert (found.groups[0].n, found.groups[0].deviation) == (3, {"val_accuracy": 0.01})
    assert fake.sent[0].query == [("ids", "job1,job2"), ("by", "norm,optim.lr")]


def test_options_tell_what_may_be_submitted(client: Any) -> None:
    options = client.options()
    assert options.groups["norm"].default == "sync"
    (key,) = options.groups["optim"].choices["sgd"].values
    assert (key.key, key.exclusive_minimum, key.minimum, key.maximum) == ("optim.lr", 0, None, 100)
    assert options.limits["sweep_jobs"] == 1000


def test_wait_returns_the_job_when_it_has_ended(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add()
    fake.looks[job_id] = deque([{}, running(), ended("failed", "rank 1 was killed")])
    job = client.wait(job_id, timeout_s=60)
    assert (job.state, job.reason) == ("failed", "rank 1 was killed")


def test_wait_ends_when_its_time_is_over(client: Any, fake: FakeJobs) -> None:
    with pytest.raises(JobTimeoutError, match=r"job1 has not ended after 0\.2 s: it is queued \(w"):
        client.wait(fake.add(), timeout_s=0.2)


def test_watch_gives_a_job_whenever_it_has_changed(client: Any, fake: FakeJobs) -> None:
    job_id = fake.add()
    fake.looks[job_id] = deque([{}, {}, running(1), running(2), {}, ended("finished")])
    seen = [(job.state, job.progress and job.progress.step) for job in client.watch(job_id)]
    assert seen == [("queued", None), ("running", 1), ("running", 2), ("finished", 2)]


def test_watch_gives_all_jobs_of_a_sweep_until_all_have_ended(client: Any, fake: FakeJobs) -> None:
    sweep = client.submit(sweep={"seed": [1, 2]})
    fake.looks["job1"] = deque([{}, ended("finished")])
    fake.looks["job2"] = deque([{}, running(), ended("failed")])
    seen = [[job.state for job in jobs] for jobs in client.watch_sweep(sweep.id)]
    assert seen == [["queued", "queued"], ["finished", "running"], ["finished", "failed"]]


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "job 1", "job1?x=1"])
def test_identifiers_that_would_ask_for_something_else_are_refused(
    client: Any, fake: FakeJobs, job_id: str
) -> None:
    with pytest.raises(JobNotFoundError, match="is no identifier of a job, such as"):
        client.show(job_id)
    with pytest.raises(JobNotFoundError):
        client.compare(["job1", job_id])
    assert fake.sent == []


def test_unknown_job_is_an_error_of_that_status(client: Any) -> None:
    with pytest.raises(ServerError, match="there is no job nobody") as raised:
        client.show("nobody")
    assert raised.value.status == 404
