"""The client and the service understand each other, with a real server between them."""

from collections.abc import Generator
from pathlib import Path

import pytest

from syncbn.client import (
    Job,
    JobsClient,
    LogEvent,
    MetricsEvent,
    StateEvent,
    Submission,
    Sweep,
)
from syncbn.errors import ServerError
from syncbn.jobs.states import State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from tests.service.jobs.conftest import Shop
from tests.support.serving import served


@pytest.fixture(scope="module")
def served_shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[JobsClient, Shop]]:
    """A service whose jobs the tests move themselves, and its client."""
    directory = tmp_path_factory.mktemp("service")
    store = Store(directory / "jobs")
    shop = Shop(directory / "jobs", store, Ledger(store))
    options = ("--jobs", str(shop.directory), "--no-dispatcher")
    with (
        served(directory / "models", directory / "log", *options) as service,
        JobsClient(service.url) as client,
    ):
        yield client, shop
    store.close()


@pytest.fixture
def client(served_shop: tuple[JobsClient, Shop]) -> JobsClient:
    return served_shop[0]


@pytest.fixture
def own_shop(served_shop: tuple[JobsClient, Shop]) -> Shop:
    return served_shop[1]


def test_job_is_submitted_once_shown_listed_and_cancelled(client: JobsClient) -> None:
    submission = Submission(
        name="once",
        choices={"norm": "local"},
        values={"epochs": 2, "optim.lr": 0.05},
        retries=2,
        idempotency_key="a",
    )
    job = client.submit(**submission)
    assert isinstance(job, Job)
    assert client.submit(**submission) == job
    assert (job.name, job.retries, job.choices) == ("once", 2, {"norm": "local"})
    shown = client.show(job.id)
    assert shown.changed["optim.lr"].value == 0.05
    assert shown.transitions[0].state == "submitted"
    assert [each.id for each in client.list(name="once", states=["submitted", "queued"])] == [
        job.id
    ]
    assert "cancel" in shown.actions
    assert client.cancel(job.id).wanted == "cancelled"
    assert client.show(job.id).events[-1].data["action"] == "cancel"


def test_sweep_is_listed_over_several_pages(client: JobsClient) -> None:
    sweep = client.submit(name="grid", sweep={"seed": [1, 2, 3], "norm": ["sync", "local"]})
    assert isinstance(sweep, Sweep)
    found = list(client.list(sweep=sweep.id, limit=2))
    assert {job.id for job in found} == {job.id for job in sweep.jobs}
    assert sweep.jobs[1].sweep_values == {"seed": 1, "norm": "local"}
    assert client.page(sweep=sweep.id).total == 6
    comparison = client.compare([job.id for job in sweep.jobs], by=["norm.name"])
    assert [group.n for group in comparison.groups] == [3, 3]


def test_what_is_refused_says_what_is_valid(client: JobsClient) -> None:
    with pytest.raises(ServerError, match=r"optim\.lr=-1: must be a number above 0") as raised:
        client.submit(values={"optim.lr": -1})
    assert raised.value.status == 400
    with pytest.raises(ServerError, match="there is no job") as raised:
        client.show("nobody")
    assert raised.value.status == 404


def test_options_have_groups_keys_and_limits(client: JobsClient) -> None:
    options = client.options()
    assert options.groups["norm"].default == "sync"
    assert "norm.group_size" in [
        key.key for key in options.groups["norm"].choices["whitening"].values
    ]
    assert {key.key for key in options.job} >= {"name", "priority", "publish"}
    assert options.limits["sweep_jobs"] > 0


def test_progress_log_and_metrics_come_as_the_trainer_writes_them(
    client: JobsClient, own_shop: Shop
) -> None:
    job = own_shop.move(own_shop.submit(name="running"), State.running)
    own_shop.ledger.note_progress(
        {job.id: {"phase": "training", "step": 3, "total_steps": 30, "time_left_s": None}}
    )
    own_shop.measure(job, {"step": 1, "val_loss": float("nan")}, {"step": 2, "val_loss": 0.5})
    own_shop.print(job, "μ " * 200_000)
    shown = client.show(job.id)
    assert shown.progress is not None
    assert (shown.progress.fraction, shown.progress.phase) == (0.1, "training")
    assert client.metrics(job.id) == (
        {"step": 1, "val_loss": None},
        {"step": 2, "val_loss": 0.5},
    )
    assert client.metrics(job.id, after=1) == ({"step": 2, "val_loss": 0.5},)
    assert "".join(client.log(job.id)) == "μ " * 200_000
    assert "".join(client.log(job.id, offset=-5)) == " μ "


def test_events_of_a_job_end_with_all_that_it_wrote(client: JobsClient, own_shop: Shop) -> None:
    job = own_shop.submit(name="followed")
    own_shop.print(job, "one\n")
    events = client.events(job.id)
    first = next(events)
    assert isinstance(first, StateEvent)
    assert first.job.state == "submitted"
    own_shop.move(job, State.finished)
    own_shop.measure(job, {"step": 1})
    own_shop.print(job, "two\n")
    rest = list(events)
    assert [event.job.state for event in rest if isinstance(event, StateEvent)][-1] == "finished"
    assert "".join(event.text for event in rest if isinstance(event, LogEvent)) == "one\ntwo\n"
    assert [event.metrics for event in rest if isinstance(event, MetricsEvent)] == [{"step": 1}]
    assert client.wait(job.id, timeout_s=5).state == "finished"


def test_events_of_all_jobs_go_on_from_where_a_list_was_read(
    client: JobsClient, own_shop: Shop
) -> None:
    last_event = client.page().last_event
    job = own_shop.submit(name="later")
    event = next(client.events(last_event_id=last_event))
    assert isinstance(event, StateEvent)
    assert event.job.id == job.id


def test_service_without_jobs_says_so(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    said = "takes no jobs; start it with --jobs"
    with (
        served(tmp_path / "models", tmp_path / "log") as service,
        JobsClient(service.url) as client,
        pytest.raises(ServerError, match=said),
    ):
        client.options()
