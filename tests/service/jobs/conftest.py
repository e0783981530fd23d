"""A service of training jobs, its store, and jobs in it that are in any state."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.states import State
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.store.store import Store
from syncbn.jobs.workspace import Workspace

# The states on the way to each.
WAYS = {
    State.submitted: (),
    State.queued: (State.queued,),
    State.running: (State.queued, State.starting, State.running),
    State.finished: (State.queued, State.starting, State.running, State.finished),
    State.failed: (State.queued, State.starting, State.running, State.failed),
}


@dataclass(frozen=True)
class Shop:
    """A store, and what a dispatcher and a trainer would write into it."""

    directory: Path
    store: Store
    ledger: Ledger

    def submit(self, owner: str = "anonymous", **submission: Any) -> Job:
        specs = Catalog().check({"name": "digits"} | submission)
        return self.store.submit(specs, owner=owner)[0]

    def move(self, job: Job, state: State, **columns: Any) -> Job:
        for each in WAYS[state]:
            job = self.ledger.move(job, each, None, "", **columns)
        return job

    def workspace(self, job: Job) -> Workspace:
        workspace = Workspace.of_job(self.directory, job.id)
        workspace.run.path.mkdir(parents=True, exist_ok=True)
        return workspace

    def measure(self, job: Job, *lines: dict[str, Any], file: str = "metrics.jsonl") -> None:
        with (self.workspace(job).run.path / file).open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    def print(self, job: Job, text: str) -> None:
        with self.workspace(job).console.open("a") as stream:
            stream.write(text)


@pytest.fixture
def shop(tmp_path: Path) -> Generator[Shop]:
    store = Store(tmp_path / "jobs")
    yield Shop(tmp_path / "jobs", store, Ledger(store))
    store.close()


@pytest.fixture
def jobs(shop: Shop, tmp_path: Path) -> Generator[TestClient]:
    (tmp_path / "models").mkdir()
    settings = Settings(
        models=tmp_path / "models", jobs=shop.directory, allowed_hosts=["testserver"]
    )
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
