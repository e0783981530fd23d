import json
import logging
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.jobs import comparison
from service.keys import make_key
from service.settings import Settings
from syncbn.jobs.job import DispatcherInfo, Job
from syncbn.jobs.states import State
from syncbn.jobs.store.database import FILE, Database
from syncbn.jobs.store.ledger import Ledger
from tests.service.jobs.conftest import Shop

JSON = {"Content-Type": "application/json"}


def test_submission_is_answered_with_the_job_and_stored(jobs: TestClient, shop: Shop) -> None:
    submission = {
        "name": "digits-cnn",
        "choices": {"norm": "local"},
        "values": {"epochs": 2, "optim.lr": 0.05},
        "priority": 3,
        "retries": 1,
    }
    answer = jobs.post("/v1/jobs", json=submission)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    stored = shop.store.get(job["id"])
    assert (stored.name, stored.owner, stored.state) == ("digits-cnn", "anonymous", "submitted")
    assert job["kind"] == "job"
    assert job["choices"] == {"norm": "local"}
    assert job["values"] == {"epochs": 2, "optim.lr": 0.05}
    assert (job["priority"], job["retries"], job["sweep"]) == (3, 1, None)
    assert (job["progress"], job["metrics"], job["started"], job["ended"]) == (None,) * 4
    assert job["actions"] == ["cancel", "pause"]
    assert "syncbn-dispatch" in job["waiting_for"]


def test_sweep_is_answered_with_its_jobs(jobs: TestClient) -> None:
    submission = {"name": "seeds", "sweep": {"seed": [0, 1], "norm": ["sync", "local"]}}
    sweep = jobs.post("/v1/jobs", json=submission).json()
    assert (sweep["kind"], sweep["name"], len(sweep["jobs"])) == ("sweep", "seeds", 4)
    assert {job["sweep"] for job in sweep["jobs"]} == {sweep["id"]}
    assert sweep["jobs"][0]["sweep_values"] == {"seed": 0, "norm": "sync"}
    found = jobs.get("/v1/jobs", params={"sweep": sweep["id"]}).json()
    assert found["total"] == 4
    unnamed = jobs.post("/v1/jobs", json={"sweep": {"seed": [0, 1]}}).json()
    assert unnamed["jobs"][0]["name"] == f"{unnamed['name']}-1"


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        ({"values": {"optim.lr": -1}}, "optim.lr=-1: must be"),
        ({"choices": {"norm": "synch"}}, "sync"),
        ({"values": {"hydra.run.dir": "/"}}, "hydra.run.dir"),
        ({"colour": 1}, "colour"),
        ({"sweep": {"seed": []}}, "sweep.seed=[]: must be a list"),
    ],
)
def test_refused_submission_says_key_value_and_what_is_valid(
    jobs: TestClient, shop: Shop, submission: dict[str, Any], message: str
) -> None:
    answer = jobs.post("/v1/jobs", json=submission)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert shop.store.select().total == 0


@pytest.mark.parametrize("body", ["", "[]", "{", "1", "\xff", "[" * 10_000])
def test_body_that_is_no_object_is_refused(jobs: TestClient, body: str) -> None:
    answer = jobs.post("/v1/jobs", content=body.encode("latin-1"), headers=JSON)
    assert answer.status_code == (201 if not body else 400)  # all has a default


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_of_more_than_a_mebibyte_is_refused(jobs: TestClient, is_chunked: bool) -> None:
    body = b'{"name": "' + bytes(1 << 20) + b'"}'
    answer = jobs.post("/v1/jobs", content=iter([body]) if is_chunked else body, headers=JSON)
    assert answer.status_code == 413
    assert "larger than 1048576 bytes; send less" in answer.json()["error"]


def test_repeated_submission_returns_what_is_there(jobs: TestClient, shop: Shop) -> None:
    headers = {"Idempotency-Key": "abc"}
    first, again = (
        jobs.post("/v1/jobs", json={"name": "one"}, headers=headers).json() for _ in range(2)
    )
    assert first["id"] == again["id"]
    assert shop.store.select().total == 1
    other = jobs.post("/v1/jobs", json={"name": "two"}, headers=headers)
    assert other.status_code == 400
    assert "was used for another submission" in other.json()["error"]
    assert jobs.post("/v1/jobs", json={}, headers={"Idempotency-Key": ""}).status_code == 400


def test_jobs_are_listed_by_pages_and_counted(jobs: TestClient, shop: Shop) -> None:
    made = [shop.submit() for _ in range(5)]
    shop.move(made[0], State.running)
    shop.move(made[1], State.failed)
    first = jobs.get("/v1/jobs", params={"limit": 3}).json()
    assert [job["id"] for job in first["jobs"]] == [job.id for job in reversed(made[2:])]
    assert first["total"] == 5
    assert first["counts"] == {"submitted": 3, "running": 1, "failed": 1}
    second = jobs.get("/v1/jobs", params={"limit": 3, "cursor": first["next"]}).json()
    assert [job["id"] for job in second["jobs"]] == [made[1].id, made[0].id]
    assert second["next"] is None


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("state=running", {"b"}),
        ("state=running&state=submitted", {"quartz", "b"}),
        ("state=running,submitted", {"quartz", "b"}),
        ("name=quartz", {"quartz"}),
        ("text=QUARTZ", {"quartz"}),
        ("text=renorm", {"b"}),
        ("text=%25", set()),
        ("owner=anonymous", {"quartz", "b"}),
        ("owner=eve", set()),
        ("archived=true", set()),
        ("sweep=none", set()),
    ],
)
def test_list_shows_what_is_asked_for(
    jobs: TestClient, shop: Shop, query: str, expected: set[str]
) -> None:
    shop.submit(name="quartz")
    shop.move(shop.submit(name="b", choices={"norm": "renormalize"}), State.running)
    found = jobs.get(f"/v1/jobs?{query}").json()
    assert {job["name"] for job in found["jobs"]} == expected
    assert found["total"] == len(expected)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v1/jobs?state=nope", 400, "state=nope: must be one of submitted, queued"),
        ("/v1/jobs?limit=0", 400, "limit=0: Input should be greater than or equal to 1"),
        ("/v1/jobs?limit=501", 400, "less than or equal to 500"),
        ("/v1/jobs?cursor=x", 400, "cursor=x"),
        ("/v1/jobs/nope", 404, "there is no job 'nope'"),
        ("/v1/jobs/..%2F..%2Fetc", 404, ""),
        ("/v1/jobs/nope/log", 404, "there is no job"),
        ("/v1/jobs/nope/metrics", 404, "there is no job"),
        ("/v1/jobs/nope/curves.png", 404, "there is no job"),
        ("/v1/jobs/nope/events", 404, "there is no job"),
        ("/v1/jobs/compare", 400, "ids"),
        ("/v1/jobs/compare?ids=nope", 404, "there is no job"),
        ("/v1/jobs/compare?ids=", 400, "name 1 to"),
        ("/v1/events", 400, "Last-Event-ID 'x' is not of this stream"),
        ("/v1/nope", 404, "Not Found"),
    ],
)
def test_wrong_question_is_answered_with_what_is_wrong(
    jobs: TestClient, path: str, status: int, message: str
) -> None:
    answer = jobs.get(path, headers={"Last-Event-ID": "x"})
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_progress_is_told_with_its_fraction_and_metrics(jobs: TestClient, shop: Shop) -> None:
    job = shop.move(shop.submit(), State.running)
    progress = {"phase": "training", "step": 12, "total_steps": 120, "metrics": {"val_loss": 0.5}}
    shop.ledger.note_progress({job.id: progress})
    body = jobs.get(f"/v1/jobs/{job.id}").json()
    assert body["progress"] == {
        "phase": "training",
        "step": 12,
        "total_steps": 120,
        "fraction": 0.1,
    }
    assert body["metrics"] == {"val_loss": 0.5}
    assert body["reason"] == "training, step 12 of 120"


def test_progress_of_the_attempt_before_is_not_that_of_this_one(
    jobs: TestClient, shop: Shop
) -> None:
    job = shop.move(shop.submit(), State.running, started=200.0)
    said = {"phase": "done", "step": 9, "total_steps": 9, "metrics": {"val_loss": 0.5}}
    shop.ledger.note_progress({job.id: said | {"updated": 100.0}})
    body = jobs.get(f"/v1/jobs/{job.id}").json()
    assert (body["progress"], body["reason"]) == (None, "")
    assert body["metrics"] == {"val_loss": 0.5}
    shop.ledger.note_progress({job.id: said | {"updated": 201.0}})
    assert jobs.get(f"/v1/jobs/{job.id}").json()["reason"] == "done, step 9 of 9"


def test_detail_has_transitions_configuration_and_what_differs(
    jobs: TestClient, shop: Shop
) -> None:
    job = shop.submit(choices={"norm": "local"}, values={"epochs": 2})
    shop.move(job, State.running)
    body = jobs.get(f"/v1/jobs/{job.id}").json()
    states = [each["state"] for each in body["transitions"]]
    assert states == ["submitted", "queued", "starting", "running"]
    assert body["transitions"][0]["by"] == "anonymous"
    assert body["changed"]["norm"] == {"default": "sync", "value": "local"}
    assert body["changed"]["epochs"]["value"] == 2
    assert body["config"] == {"norm.name": "local", "epochs": 2}
    assert body["attempts"] == []
    run = shop.workspace(job).run
    run.config_file.write_text("norm: {name: local}\nepochs: 2\nrun_dir: /somewhere\n")
    body = jobs.get(f"/v1/jobs/{job.id}").json()
    assert body["config"] == {"norm.name": "local", "epochs": 2}


def test_action_is_asked_for_and_refused_where_the_state_does_not_allow_it(
    jobs: TestClient, shop: Shop
) -> None:
    job = shop.submit()
    answer = jobs.post(f"/v1/jobs/{job.id}/cancel", headers=JSON)
    assert answer.status_code == 202
    assert answer.json()["wanted"] == "cancelled"
    (request,) = shop.ledger.requests()
    assert (request.action, request.by) == ("cancel", "anonymous")
    refused = jobs.post(f"/v1/jobs/{job.id}/retry", json={})
    assert refused.status_code == 409
    assert "retry is for jobs that are" in refused.json()["error"]
    assert jobs.post(f"/v1/jobs/{job.id}/explode", json={}).status_code == 400
    assert jobs.post("/v1/jobs/nope/cancel", json={}).status_code == 404


def test_finished_job_goes_on_with_more_epochs_alone(jobs: TestClient, shop: Shop) -> None:
    job = shop.move(shop.submit(values={"epochs": 2}), State.finished)
    resume = f"/v1/jobs/{job.id}/resume"
    for body, message in (
        ({"values": {"epochs": -1}}, "epochs=-1"),
        ({"values": {"hydra.x": 1}}, "hydra.x"),
        ({"values": 3}, "values=3"),
        ({"epochs": 20}, "epochs: resume takes only values"),
    ):
        answer = jobs.post(resume, json=body)
        assert answer.status_code == 400, body
        assert message in answer.json()["error"]
    assert shop.ledger.requests() == []
    assert jobs.post(resume, json={"values": {"epochs": 20}}).status_code == 202
    assert shop.ledger.requests()[0].arguments == {"epochs": 20}


def test_model_is_published_under_a_name_that_is_a_name(jobs: TestClient, shop: Shop) -> None:
    job = shop.move(shop.submit(), State.finished)
    publish = f"/v1/jobs/{job.id}/publish"
    answer = jobs.post(publish, json={"model": "../../etc"})
    assert answer.status_code == 400
    assert "../../etc" in answer.json()["error"]
    assert jobs.post(publish, json={"model": "digits"}).status_code == 202
    assert jobs.post(publish, json={}).status_code == 202
    assert [each.arguments for each in shop.ledger.requests()] == [{"model": "digits"}, {}]


def test_longest_name_of_a_job_of_a_sweep_does_not_keep_it_from_being_published(
    jobs: TestClient, shop: Shop
) -> None:
    job = shop.move(shop.submit(name="n" * 100, sweep={"seed": [1, 2]}), State.finished)
    assert len(job.name) == 102
    assert jobs.post(f"/v1/jobs/{job.id}/publish", json={"model": "digits"}).status_code == 202


@pytest.fixture
def keyed(shop: Shop, tmp_path: Path) -> Generator[tuple[TestClient, dict[str, str]]]:
    file = tmp_path / "keys"
    scopes = {
        "anna": ["jobs:write"],
        "ben": ["jobs:write"],
        "eve": ["jobs:read"],
        "root": ["admin"],
    }
    keys = {label: make_key(file, allowed, label) for label, allowed in scopes.items()}
    (tmp_path / "models").mkdir()
    settings = Settings(
        models=tmp_path / "models",
        jobs=shop.directory,
        api_keys=file,
        allowed_hosts=["testserver"],
    )
    with TestClient(create_app(settings)) as client:
        yield client, keys


def test_owner_and_admin_alone_change_a_job(
    keyed: tuple[TestClient, dict[str, str]], shop: Shop
) -> None:
    client, keys = keyed

    def ask(label: str, method: str, path: str) -> Any:
        headers = JSON | {"X-API-Key": keys[label]}
        return client.request(method, path, headers=headers, content=b"{}")

    job = ask("anna", "POST", "/v1/jobs").json()
    assert job["owner"] == "anna"
    assert job["actions"]
    seen = ask("ben", "GET", f"/v1/jobs/{job['id']}").json()
    assert (seen["owner"], seen["actions"]) == ("anna", [])
    refused = ask("ben", "POST", f"/v1/jobs/{job['id']}/cancel")
    assert refused.status_code == 403
    assert "is anna's, and you are ben: only its owner and keys with" in refused.json()["error"]
    assert ask("eve", "POST", f"/v1/jobs/{job['id']}/cancel").status_code == 403
    assert ask("eve", "POST", "/v1/jobs").status_code == 403
    assert shop.ledger.requests() == []
    assert ask("anna", "POST", f"/v1/jobs/{job['id']}/pause").status_code == 202
    assert ask("root", "POST", f"/v1/jobs/{job['id']}/cancel").status_code == 202
    assert [each.by for each in shop.ledger.requests()] == ["anna", "root"]
    assert keys["anna"] not in str(jobs_file(shop).read_bytes())


def jobs_file(shop: Shop) -> Path:
    return shop.directory / FILE


def test_one_idempotency_key_of_two_owners_is_two_keys(
    keyed: tuple[TestClient, dict[str, str]],
) -> None:
    client, keys = keyed
    ids = {
        client.post(
            "/v1/jobs", json={}, headers={"X-API-Key": keys[label], "Idempotency-Key": "k"}
        ).json()["id"]
        for label in ("anna", "ben", "anna")
    }
    assert len(ids) == 2


def test_log_is_read_a_piece_at_a_time(jobs: TestClient, shop: Shop) -> None:
    job = shop.submit()
    assert jobs.get(f"/v1/jobs/{job.id}/log").text == ""
    shop.print(job, "=== attempt 1, now ===\nöne\n=== attempt 2, now ===\ntwo\n")
    answer = jobs.get(f"/v1/jobs/{job.id}/log", params={"limit": 24})
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "=== attempt 1, now ===\n"  # a letter is not cut
    assert (answer.headers["x-log-offset"], answer.headers["x-log-size"]) == ("23", "55")
    answer = jobs.get(f"/v1/jobs/{job.id}/log", params={"offset": 23})
    assert answer.text == "öne\n=== attempt 2, now ===\ntwo\n"
    assert answer.headers["x-log-offset"] == "55"
    assert jobs.get(f"/v1/jobs/{job.id}/log?attempt=2").text == "=== attempt 2, now ===\ntwo\n"
    assert jobs.get(f"/v1/jobs/{job.id}/log?offset=-4").text == "two\n"
    missing = jobs.get(f"/v1/jobs/{job.id}/log?attempt=3")
    assert missing.status_code == 404
    assert "has no attempt 3" in missing.json()["error"]
    assert jobs.get(f"/v1/jobs/{job.id}/log?limit=1048577").status_code == 400


def test_metrics_are_given_as_json_and_as_a_table(jobs: TestClient, shop: Shop) -> None:
    job = shop.submit()
    path = f"/v1/jobs/{job.id}/metrics"
    assert jobs.get(path).json() == {"metrics": []}
    shop.measure(job, {"step": 1, "val_loss": float("nan")}, {"step": 2, "val_loss": 0.5})
    shop.measure(job, {"step": 7, "loss": 1.5}, file="steps.jsonl")
    expected = [{"step": 1, "val_loss": None}, {"step": 2, "val_loss": 0.5}]
    assert jobs.get(path).json() == {"metrics": expected}
    assert jobs.get(path, params={"after": 1}).json() == {"metrics": expected[1:]}
    assert jobs.get(path, params={"kind": "steps"}).json() == {
        "metrics": [{"step": 7, "loss": 1.5}]
    }
    table = jobs.get(path, params={"format": "csv"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert table.text == "step,val_loss\n1,nan\n2,0.5\n"
    assert jobs.get(path, params={"kind": "x"}).status_code == 400


def test_curves_are_drawn_anew_when_something_was_measured(
    jobs: TestClient, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = shop.submit()
    path = f"/v1/jobs/{job.id}/curves.png"
    nothing = jobs.get(path)
    assert nothing.status_code == 404
    assert "nothing was measured yet" in nothing.json()["error"]
    epoch = {"step": 1, "epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "lr": 0.1}
    shop.measure(job, epoch)
    first = jobs.get(path)
    assert first.headers["content-type"] == "image/png"
    assert first.content.startswith(b"\x89PNG")
    files = {file.name for file in shop.workspace(job).run.path.iterdir()}
    assert files == {"metrics.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr("service.jobs.curves._PROGRAM", "raise SystemExit('no')")
        assert jobs.get(path).content == first.content
        shop.measure(job, epoch | {"epoch": 2, "train_loss": 0.5})
        failed = jobs.get(path)
        assert failed.status_code == 500
        assert failed.json()["error"] == "the curves could not be drawn: no"
    assert jobs.get(path).content not in (first.content, b"")


def test_jobs_are_compared_over_seeds(jobs: TestClient, shop: Shop) -> None:
    made = [
        shop.submit(values={"seed": seed}, choices={"norm": norm})
        for norm in ("sync", "local")
        for seed in (1, 2, 3)
    ]
    for number, job in enumerate(made):
        shop.measure(job, {"step": 1, "epoch": 1, "best": True, "val_accuracy": 0.1 * number})
        config = {"name": f"jobs-{number}", "seed": number % 3 + 1, "run_dir": f"/{number}"}
        norm = {"norm": {"name": job.spec.choices["norm"]}}
        shop.workspace(job).run.config_file.write_text(json.dumps({**config, **norm}))
    ids = [job.id for job in made]
    body = jobs.get("/v1/jobs/compare", params={"ids": ",".join(ids)}).json()
    assert [job["id"] for job in body["jobs"]] == ids
    assert body["jobs"][1]["metrics"]["val_accuracy"] == pytest.approx(0.1)
    assert set(body["keys"]) == {"seed", "norm.name"}
    assert body["keys"]["seed"][ids[4]] == 2
    first, second = body["groups"]
    assert (first["values"], first["ids"], first["n"]) == ({"norm.name": "sync"}, ids[:3], 3)
    assert first["mean"]["val_accuracy"] == pytest.approx(0.1)
    assert first["deviation"]["val_accuracy"] == pytest.approx(0.1)
    assert second["mean"]["val_accuracy"] == pytest.approx(0.4)
    assert "epoch" not in first["mean"]
    alone = jobs.get("/v1/jobs/compare", params={"ids": ids[0]}).json()
    assert alone["keys"] == {}
    assert alone["groups"][0]["deviation"] == {"val_accuracy": None}
    by = jobs.get("/v1/jobs/compare", params={"ids": ids, "by": "seed"}).json()
    assert [group["n"] for group in by["groups"]] == [2, 2, 2]


def test_jobs_of_a_sweep_are_not_kept_apart_by_their_names() -> None:
    configs = [{"name": f"digits-{seed}", "seed": seed, "norm.name": "sync"} for seed in (1, 2)]
    assert comparison.differing_keys(configs) == ["seed"]


def test_keys_that_only_some_choices_have_are_told_by_their_names() -> None:
    configs = [
        {"norm.name": "sync", "norm.eps": 1e-5, "epochs": 2},
        {"norm.name": "none", "epochs": 2, "max_steps": 3},
    ]
    assert comparison.differing_keys(configs) == ["norm.name", "max_steps"]


def test_options_say_what_may_be_chosen_and_who_starts_jobs(jobs: TestClient) -> None:
    body = jobs.get("/v1/options").json()
    assert body["groups"]["norm"]["default"] == "sync"
    assert body["dispatcher"] is None
    keys = {key["key"]: key for key in body["values"]}
    assert keys["epochs"]["type"] == "integer"
    assert {key["key"] for key in body["job"]} >= {"name", "priority", "retries", "publish"}
    assert body["limits"]["sweep_jobs"] == 1000


def test_too_many_waiting_jobs_are_refused(jobs: TestClient, shop: Shop) -> None:
    (shop.directory / "settings.toml").write_text("[limits]\nwaiting_jobs = 2\n")
    settings = Settings(
        models=shop.directory, jobs=shop.directory, allowed_hosts=["testserver"], drift=False
    )
    with TestClient(create_app(settings)) as client:
        assert client.post("/v1/jobs", json={"sweep": {"seed": [0, 1]}}).status_code == 201
        answer = client.post("/v1/jobs", json={})
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    assert "2 jobs of anonymous wait already" in answer.json()["error"]


def test_limits_hold_for_jobs_that_are_to_go_on(jobs: TestClient, shop: Shop) -> None:
    (shop.directory / "settings.toml").write_text("[limits]\nwaiting_jobs = 1\ndisk_bytes = 1000\n")
    ended = [shop.move(shop.submit(), State.failed) for _ in range(2)]
    settings = Settings(
        models=shop.directory, jobs=shop.directory, allowed_hosts=["testserver"], drift=False
    )
    with TestClient(create_app(settings)) as client:

        def retry(job: Job) -> Any:
            return client.post(f"/v1/jobs/{job.id}/retry", json={})

        assert [retry(ended[0]).status_code for _ in range(2)] == [202, 202]  # which is one
        assert "1 jobs of anonymous wait already" in retry(ended[1]).json()["error"]
        assert client.post("/v1/jobs", json={}).status_code == 429
        (request,) = shop.ledger.requests()
        shop.ledger.done(request, "note", {"text": "refused"}, wanted=None)
        shop.ledger.note_sizes({ended[0].id: 1000})
        answer = retry(ended[1])
    assert answer.status_code == 429
    assert "have 1000 bytes, and at most 1000 are allowed" in answer.json()["error"]


def test_owner_whose_jobs_fill_the_disk_is_refused(jobs: TestClient, shop: Shop) -> None:
    (shop.directory / "settings.toml").write_text("[limits]\ndisk_bytes = 1000\n")
    settings = Settings(
        models=shop.directory, jobs=shop.directory, allowed_hosts=["testserver"], drift=False
    )
    with TestClient(create_app(settings)) as client:
        job = client.post("/v1/jobs", json={}).json()["id"]
        Ledger(shop.store).note_sizes({job: 1000})
        answer = client.post("/v1/jobs", json={})
    assert answer.status_code == 429
    assert "the files of the jobs of anonymous have 1000 bytes" in answer.json()["error"]


def test_damaged_store_is_told_and_models_are_served_on(jobs: TestClient, shop: Shop) -> None:
    job = shop.submit()
    shop.store.close()
    file = jobs_file(shop)
    for each in shop.directory.glob(f"{FILE}-*"):
        each.unlink()
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(b"no database" * 1000)
    for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", f"/v1/jobs/{job.id}")):
        answer = jobs.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 503, path
        assert "the file is damaged" in answer.json()["error"]
        assert answer.headers["retry-after"]
    assert jobs.get("/v2/models").status_code == 200
    file.unlink()
    (shop.directory / "copy").write_bytes(whole)
    (shop.directory / "copy").rename(file)
    assert jobs.get(f"/v1/jobs/{job.id}").status_code == 200


def test_store_that_is_gone_is_told_and_no_empty_one_made(jobs: TestClient, shop: Shop) -> None:
    shop.submit()
    assert jobs.get("/v1/jobs").json()["total"] == 1
    away = jobs_file(shop).rename(shop.directory / "away")
    for _ in range(2):
        answer = jobs.get("/v1/jobs")
        assert answer.status_code == 503
        assert "is gone; put it or a copy there" in answer.json()["error"]
    assert not jobs_file(shop).exists()
    away.rename(jobs_file(shop))
    assert jobs.get("/v1/jobs").json()["total"] == 1


def test_store_that_somebody_keeps_is_told(
    jobs: TestClient, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncbn.jobs.store.database._BUSY_TIMEOUT_S", 0.05)
    with sqlite3.connect(jobs_file(shop), isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = jobs.post("/v1/jobs", json={})
        assert answer.status_code == 503
        assert "another process has kept it for too long" in answer.json()["error"]
        assert jobs.get("/v1/jobs").status_code == 200  # who reads need not wait
        other.execute("ROLLBACK")
    other.close()
    assert jobs.post("/v1/jobs", json={}).status_code == 201


def test_full_store_is_told(jobs: TestClient, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shop.submit()
    connect: Any = Database._connection  # pyright: ignore[reportPrivateUsage] -- to fill it

    def connect_to_full(database: Database) -> sqlite3.Connection:
        connection = connect(database)
        connection.execute("PRAGMA max_page_count = 1")  # as many as there are is the least
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_connection", connect_to_full)
        answer = jobs.post("/v1/jobs", json={"sweep": {"seed": [*range(200)]}})
        assert answer.status_code == 503
        assert "full" in answer.json()["error"]
        assert jobs.get(f"/v1/jobs/{job.id}").status_code == 200
    assert shop.store.select().total == 1


def _metrics_of_jobs(jobs: TestClient) -> dict[str, float]:
    lines = jobs.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("syncbn_jobs"))
    return {name: float(value) for name, value in found.items()}


def test_jobs_and_their_dispatcher_are_among_the_metrics(jobs: TestClient, shop: Shop) -> None:
    for state in (State.queued, State.running, State.running):
        shop.move(shop.submit(), state)
    found = _metrics_of_jobs(jobs)
    assert found['syncbn_jobs{state="running"}'] == 2
    assert found['syncbn_jobs{state="queued"}'] == 1
    assert found['syncbn_jobs{state="failed"}'] == 0
    assert found['syncbn_jobs_up{part="store"}'] == 1
    assert found['syncbn_jobs_up{part="dispatcher"}'] == 0
    now = time.time()
    shop.ledger.say_alive(DispatcherInfo(1, "here", "local", 8, 0, 3, 0, now, now))
    found = _metrics_of_jobs(jobs)
    assert found['syncbn_jobs_up{part="dispatcher"}'] == 1
    assert found['syncbn_jobs_cores{use="busy"}'] == 5
    assert found['syncbn_jobs_cores{use="free"}'] == 3
    for file in shop.directory.glob("jobs.sqlite*"):
        file.unlink()
    (shop.directory / "jobs.sqlite").write_text("this is no database" * 100)
    assert _metrics_of_jobs(jobs)['syncbn_jobs_up{part="store"}'] == 0


def test_secrets_are_in_no_error_and_no_line_of_the_log(
    keyed: tuple[TestClient, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    client, keys = keyed
    secret = keys["eve"]
    caplog.set_level(logging.DEBUG)
    for headers in ({"X-API-Key": secret}, {"Authorization": f"Bearer {secret}"}):
        for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("GET", "/v1/nope")):
            answer = client.request(method, path, headers=JSON | headers, content=b"{")
            assert answer.status_code >= 400
            assert secret not in answer.text
    wrong = client.get("/v1/jobs", headers={"Authorization": f"Basic {secret}"})
    assert wrong.status_code == 401
    assert secret not in wrong.text
    assert secret not in caplog.text


def test_service_without_jobs_says_how_it_would_take_them(models: Path) -> None:
    settings = Settings(models=models, allowed_hosts=["testserver"])
    with TestClient(create_app(settings)) as client:
        for method in ("GET", "POST"):
            answer = client.request(method, "/v1/jobs", headers=JSON)
            assert answer.status_code == 404
            assert "start it with --jobs" in answer.json()["error"]
        assert not any(
            path.startswith("/v1") for path in client.get("/openapi.json").json()["paths"]
        )


def test_description_has_all_routes_of_jobs(jobs: TestClient) -> None:
    document = jobs.get("/openapi.json").json()
    paths = {path for path in document["paths"] if path.startswith("/v1")}
    below = ("", "/log", "/metrics", "/curves.png", "/events", "/{action}")
    assert paths == {
        *("/v1/jobs", "/v1/jobs/compare", "/v1/options", "/v1/events"),
        *(f"/v1/jobs/{{id}}{each}" for each in below),
    }
    assert (
        "text/event-stream" in document["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]
    )
    assert "Submission" in document["components"]["schemas"]
