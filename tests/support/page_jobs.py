"""The routes below /v1 in memory, beside the pages: a service for tests of the page /jobs."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean, stdev
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.responses import JSONResponse, StreamingResponse

from service.access import Doorkeeper
from service.auth import Keys
from service.metrics import Metrics
from service.middleware import Gate
from service.routes import pages
from tests.support import job_answers as answers

START_TIMEOUT_S = 30


@dataclass
class FakeJobs:
    """The jobs and what is known of them; tests change them, and read what was asked.

    Attributes:
        jobs: by id, the oldest first.
        logs: the bytes of each job's log.
        posts: path, headers and body of each request that would change something.
        streams: the Last-Event-ID of each stream that was begun.
        log_bytes: how much of logs was sent.
        refusal: what the next submission is refused with, if anything.
        url: of the service, without a slash at the end.
    """

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    logs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    epochs: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, Any])
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, Any])
    posts: list[tuple[str, dict[str, str], Any]] = field(default_factory=list[Any])
    streams: list[str] = field(default_factory=list[str])
    log_bytes: int = 0
    refusal: str = ""
    dispatcher: bool = True
    url: str = ""
    _events: list[tuple[str, str, Any]] = field(default_factory=list[Any])
    _cuts: int = 0

    def add(self, *jobs: dict[str, Any]) -> None:
        """Have jobs, without telling anybody."""
        for job in jobs:
            done = job["progress"]["step"] if job["progress"] else 0
            self.jobs[job["id"]] = job
            self.epochs[job["id"]] = answers.curves(job["number"], done // 40)
            self.steps[job["id"]] = answers.steps(job["number"], done)
            lines = answers.log_lines(done // 40) if done else []
            self.logs[job["id"]] = "".join(f"{line}\n" for line in lines).encode()

    def change(self, id_: str, state: str = "", **changes: Any) -> None:
        """Change a job, and tell it."""
        job = self.jobs[id_]
        job = answers.with_state(job, state, **changes) if state else job | changes
        self.jobs[id_] = job
        self.tell("state", id_, job)

    def make_progress(self, id_: str, step: int) -> None:
        """Move a job's progress, and tell it."""
        job = self.jobs[id_]
        progress = job["progress"] | {"step": step, "fraction": step / 480, "epoch": step / 40}
        metrics = answers.curves(job["number"], max(1, step // 40))[-1]
        self.jobs[id_] = job | {"progress": progress, "metrics": metrics}
        self.tell("progress", id_, {"id": id_, "progress": progress, "metrics": metrics})

    def add_epoch(self, id_: str) -> None:
        """Add a line to metrics.jsonl of a job, and tell it."""
        number = len(self.epochs[id_]) + 1
        line = answers.curves(self.jobs[id_]["number"], number)[-1]
        self.epochs[id_].append(line)
        self.tell("metrics", id_, line)

    def write(self, id_: str, text: str) -> None:
        """Add to a job's log, and tell it."""
        offset = len(self.logs[id_])
        self.logs[id_] += text.encode()
        self.tell("log", id_, {"offset": offset, "text": text})

    def tell(self, kind: str, id_: str, data: Any) -> None:
        """Send an event to all who listen."""
        self._events.append((kind, id_, data))

    def cut(self) -> None:
        """End all streams that are open."""
        self._cuts += 1

    def options(self) -> dict[str, Any]:
        """Return what /v1/options answers."""
        return answers.OPTIONS | ({} if self.dispatcher else {"dispatcher": None})

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        """Return what /v1/jobs answers."""
        found = [job for job in reversed(self.jobs.values()) if _matches(job, query)]
        start, limit = int(query.get("cursor", "0")), int(query.get("limit", "50"))
        counts: dict[str, int] = {}
        for job in self.jobs.values():
            counts[job["state"]] = counts.get(job["state"], 0) + 1
        end = start + limit
        return {
            "jobs": found[start:end],
            "next": str(end) if end < len(found) else None,
            "total": len(found),
            "counts": counts,
            "last_event": str(len(self._events)),
        }

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what a submission answers."""
        sweep = body.get("sweep", {})
        combinations = list(product(*sweep.values()))
        first = len(self.jobs) + 1
        id_ = f"s{first:09d}" if len(combinations) > 1 else None
        made = [
            answers.job(
                first + index,
                name=body.get("name") or "digits-cnn",
                choices=body.get("choices", {}),
                values=body.get("values", {}),
                publish=body.get("publish"),
                sweep=id_,
                sweep_values=dict(zip(sweep, values, strict=True)),
            )
            for index, values in enumerate(combinations)
        ]
        self.add(*made)
        for job in made:
            self.tell("state", job["id"], job)
        return (
            {"kind": "sweep", "id": id_, "name": made[0]["name"], "jobs": made} if id_ else made[0]
        )

    async def stream(self, request: Request, id_: str | None) -> AsyncGenerator[bytes]:
        """Yield events from the one after Last-Event-ID on, or from now on."""
        last = request.headers.get("last-event-id", "")
        self.streams.append(last)
        position = int(last) if last else len(self._events)
        cuts = self._cuts
        yield b": here\n\n"
        if id_ is not None and not last:
            yield _event(position, "state", self.jobs[id_])
            for line in self.epochs[id_]:
                yield _event(position, "metrics", line)
        while self._cuts == cuts and not await request.is_disconnected():
            for kind, of, data in self._events[position:]:
                position += 1
                if id_ in (None, of) and (id_ or kind in ("state", "progress")):
                    yield _event(position, kind, data)
            await asyncio.sleep(0.01)

    def compare(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return what /v1/jobs/compare answers."""
        jobs = [answers.details(self.jobs[id_]) for id_ in ids]
        told = {job["id"]: job["config"] | job["choices"] | job["sweep_values"] for job in jobs}
        names = sorted({key for values in told.values() for key in values})
        keys = {
            key: {id_: values.get(key) for id_, values in told.items()}
            for key in names
            if len({json.dumps(values.get(key)) for values in told.values()}) > 1
        }
        groups: dict[str, list[dict[str, Any]]] = {}
        for job in jobs:
            values = {key: keys[key][job["id"]] for key in keys if key != "seed"}
            groups.setdefault(json.dumps(values), []).append(job)
        return {
            "jobs": [
                {key: job[key] for key in ("id", "name", "state", "objective", "metrics")}
                for job in jobs
            ],
            "keys": keys,
            "groups": [
                {
                    "values": json.loads(values),
                    "ids": [job["id"] for job in members],
                    "n": len(members),
                    "mean": _over(members, fmean),
                    "deviation": _over(members, stdev) if len(members) > 1 else {},
                }
                for values, members in groups.items()
            ],
        }


def _event(number: int, kind: str, data: Any) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _over(members: list[dict[str, Any]], function: Any) -> dict[str, float]:
    names = members[0]["metrics"] or {}
    return {name: function([member["metrics"][name] for member in members]) for name in names}


def _matches(job: dict[str, Any], query: dict[str, str]) -> bool:
    for name in ("state", "name", "owner", "sweep"):
        if name in query and query[name] != job[name]:
            return False
    if job["archived"] != (query.get("archived") == "true"):
        return False
    text = json.dumps([job["name"], job["reason"], job["choices"], job["values"]]).lower()
    return query.get("text", "").lower() in text


def _app(fake: FakeJobs, keys: Keys | None) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.include_router(pages.router)

    def known(id_: str) -> dict[str, Any]:
        if id_ not in fake.jobs:
            raise HTTPException(404, f"there is no job {id_}")
        return fake.jobs[id_]

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.get("/v1/options")
    async def options() -> Response:
        return JSONResponse(fake.options())

    @app.get("/v1/jobs")
    async def jobs(request: Request) -> Response:
        return JSONResponse(fake.page(dict(request.query_params)))

    @app.post("/v1/jobs")
    async def submit(request: Request) -> Response:
        body = await request.json()
        fake.posts.append(("/v1/jobs", dict(request.headers), body))
        if fake.refusal:
            refusal, fake.refusal = fake.refusal, ""
            raise HTTPException(400, refusal)
        return JSONResponse(fake.submit(body), 201)

    @app.get("/v1/events")
    async def events(request: Request) -> Response:
        return StreamingResponse(fake.stream(request, None), media_type="text/event-stream")

    @app.get("/v1/jobs/compare")
    async def compare(ids: str) -> Response:
        return JSONResponse(fake.compare([known(id_)["id"] for id_ in ids.split(",")]))

    @app.get("/v1/jobs/{id_}")
    async def job(id_: str) -> Response:
        return JSONResponse(answers.details(known(id_)))

    @app.get("/v1/jobs/{id_}/events")
    async def events_of(id_: str, request: Request) -> Response:
        known(id_)
        return StreamingResponse(fake.stream(request, id_), media_type="text/event-stream")

    @app.get("/v1/jobs/{id_}/metrics")
    async def metrics(id_: str, kind: str = "epochs", after: float = -1) -> Response:
        known(id_)
        lines = (fake.epochs if kind == "epochs" else fake.steps)[id_]
        return JSONResponse({"metrics": [line for line in lines if line["step"] > after]})

    @app.get("/v1/jobs/{id_}/log")
    async def log(id_: str, offset: int = 0, limit: int = 65536, attempt: int = 0) -> Response:
        known(id_)
        content = fake.logs[id_]
        if attempt:
            content = b"=== attempt " + content.split(b"=== attempt ")[attempt]
        start = max(0, len(content) + offset) if offset < 0 else offset
        part = content[start : start + limit]
        fake.log_bytes += len(part)
        headers = {"X-Log-Offset": str(start + len(part)), "X-Log-Size": str(len(content))}
        return Response(part, media_type="text/plain; charset=utf-8", headers=headers)

    @app.post("/v1/jobs/{id_}/{action}")
    async def act(id_: str, action: str, request: Request) -> Response:
        body = await request.json()
        fake.posts.append((f"/v1/jobs/{id_}/{action}", dict(request.headers), body))
        if action not in known(id_)["actions"]:
            raise HTTPException(409, f"{action}: job {id_} is {fake.jobs[id_]['state']}")
        if action == "publish":
            fake.change(id_, published=[{"model": body["model"], "version": "1"}])
        elif action == "archive":
            fake.change(id_, archived=True)
        else:
            after = {"cancel": "cancelled", "pause": "paused"}.get(action, "queued")
            fake.change(id_, after)
        return JSONResponse(fake.jobs[id_], 202)

    gate_options: dict[str, Any] = {"max_body_bytes": 1_000_000, "write_line": _write_nothing}
    doorkeeper = Doorkeeper("127.0.0.1", [], [])
    app.add_middleware(Gate, keys=keys, doorkeeper=doorkeeper, metrics=Metrics(), **gate_options)
    return app


def _write_nothing(**_: Any) -> None:
    pass


@contextmanager
def fake_jobs(keys: Keys | None = None) -> Generator[FakeJobs]:
    """Serve jobs that are made up, on a free port of this machine, from a thread.

    Args:
        keys: who may ask; None: everybody.
    """
    fake = FakeJobs()
    config = uvicorn.Config(_app(fake, keys), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        fake.url = f"http://127.0.0.1:{port}"
        yield fake
    finally:
        fake.cut()
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
