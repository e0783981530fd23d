"""A service of training jobs that trains nothing: its answers, and any fault that is asked for."""

import asyncio
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

_DEADLINE_S = 30
_NEXT = {"cancel": "cancelled", "pause": "paused", "resume": "queued", "retry": "queued"}

LEARNING_RATE = {
    "key": "optim.lr",
    "type": "number",
    "default": 0.1,
    "exclusive_minimum": 0,
    "maximum": 100,
    "help": "The highest learning rate.",
}
GROUP_SIZE = {
    "key": "norm.group_size",
    "type": "integer",
    "default": 16,
    "minimum": 1,
    "help": "The most channels that are whitened together.",
}
OPTIONS: dict[str, Any] = {
    "groups": {
        "norm": {
            "default": "sync",
            "help": "what normalizes",
            "choices": {
                "sync": {"help": "μ and σ of the whole batch", "values": []},
                "local": {"help": "of each replica's", "values": []},
                "whitening": {"help": "no linear relation", "values": [GROUP_SIZE]},
            },
        },
        "optim": {
            "default": "sgd",
            "help": "what learns",
            "choices": {
                "sgd": {"help": "with momentum", "values": [LEARNING_RATE]},
                "adamw": {"help": "AdamW", "values": [LEARNING_RATE]},
            },
        },
    },
    "values": [
        {"key": "epochs", "type": "integer", "default": 12, "minimum": 1, "help": "Passes."},
        {"key": "seed", "type": "integer", "default": 0, "help": "Decides the order."},
        {"key": "patience", "type": "integer", "nullable": True, "default": None},
        {"key": "recalibrate", "type": "boolean", "default": False},
        {"key": "model.depths", "type": "list", "default": [2, 2]},
        {"key": "data.set", "type": "string", "default": "digits"},
        {"key": "numerics.precision", "type": "enum", "choices": ["float32", "bfloat16"]},
    ],
    "job": [
        {"key": "name", "type": "string", "default": None, "nullable": True},
        {"key": "priority", "type": "integer", "default": 0, "minimum": -100, "maximum": 100},
        {"key": "retries", "type": "integer", "default": 0, "minimum": 0, "maximum": 10},
        {"key": "publish", "type": "string", "default": None, "nullable": True},
        {"key": "cores", "type": "integer", "default": None, "nullable": True},
        {"key": "device", "type": "enum", "default": "auto", "choices": ["auto", "cpu", "cuda"]},
    ],
    "limits": {"sweep_jobs": 1000},
    "dispatcher": {"engine": "local", "cores": 2},
}


def job_json(number: int, **changes: Any) -> dict[str, Any]:
    """Return what the service says of a job."""
    said: dict[str, Any] = {
        "kind": "job",
        "id": f"job{number}",
        "number": number,
        "name": "digits-cnn",
        "owner": "anna",
        "state": "queued",
        "reason_code": None,
        "reason": "waits for 2 cores, 1 free; third in line",
        "wanted": None,
        "sweep": None,
        "sweep_values": {},
        "choices": {},
        "values": {},
        "publish": None,
        "published": [],
        "priority": 0,
        "retries": 0,
        "cores": 2,
        "gpus": 0,
        "device": "cpu",
        "attempt": 0,
        "waiting_for": "2 cores",
        "progress": None,
        "metrics": None,
        "objective": None,
        "submitted": 1_790_000_000.0,
        "started": None,
        "ended": None,
        "archived": False,
        "actions": ["cancel", "pause"],
        "of_a_later_service": {"any": ["thing"]},
    }
    return said | changes


def running(step: int = 12, total: int = 120, accuracy: float = 0.97) -> dict[str, Any]:
    """Return what a job that trains says else than one in the queue."""
    return {
        "state": "running",
        "reason": f"training, step {step} of {total}",
        "waiting_for": "",
        "attempt": 1,
        "started": 1_790_000_001.0,
        "progress": {
            "phase": "training",
            "step": step,
            "total_steps": total,
            "fraction": step / total,
            "epoch": 0.2,
            "epochs": 2,
            "time_left_s": 8.1,
            "images_per_s": 900.0,
        },
        "metrics": {"val_accuracy": accuracy, "val_loss": 0.1},
    }


def ended(state: str, reason: str = "") -> dict[str, Any]:
    """Return what a job that has ended says else than one that trains."""
    left = {"objective": 0.025} if state == "finished" else {}
    return {
        "state": state,
        "reason": reason or state,
        "reason_code": state,
        "ended": 1_790_000_063.0,
        "actions": ["retry", "archive"],
        **left,
    }


@dataclass(frozen=True)
class Sent:
    """A request that came."""

    method: str
    path: str
    query: Sequence[tuple[str, str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Fault:
    """An answer in the place of the right one.

    Attributes:
        status: of the answer.
        body: of the answer.
        headers: of the answer.
        is_late: whether what was asked for is done before, as if the answer was lost on its way.
        missing_bytes: how many more bytes it announces than come before it breaks off.
        delay_s: how long it takes between one byte and the next.
    """

    status: int = 500
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    is_late: bool = False
    missing_bytes: int = 0
    delay_s: float = 0

    def late(self) -> "Fault":
        """Return the same after what was asked for is done."""
        return replace(self, is_late=True)


BREAK = Fault(200, b"{", missing_bytes=10)


class FakeJobs:
    """The service: jobs as dictionaries, changed by who tests.

    Attributes:
        jobs: by their identifiers.
        looks: what a job changes to, each time that it is asked for; by its identifier.
        logs: by identifiers.
        streams: what each connection for events is sent, one after the other; None breaks it off.
        faults: answers to the next requests.
        sent: the requests that came.
        key: that is wanted; None: none is.
        log_bytes: the most of a log that is sent at once.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.jobs: dict[str, dict[str, Any]] = {}
        self.looks: dict[str, deque[dict[str, Any]]] = {}
        self.logs: dict[str, bytes] = {}
        self.streams: deque[Iterable[bytes | None]] = deque()
        self.faults: deque[Fault] = deque()
        self.sent: list[Sent] = []
        self.key: str | None = None
        self.log_bytes = 1 << 20
        self._known: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self._sweeps = itertools.count(1)

    def add(self, **changes: Any) -> str:
        """Add a job and return its identifier."""
        job = job_json(next(self._numbers), **changes)
        self.jobs[job["id"]] = job
        return job["id"]

    def paths(self) -> list[str]:
        """Return the requests that came, as "GET /v1/jobs"."""
        return [f"{sent.method} {sent.path}" for sent in self.sent]

    async def answer(self, request: Request) -> Response:
        """Note a request, and answer it; with a fault if one is due."""
        pairs, headers = list(request.query_params.multi_items()), dict(request.headers)
        body = await request.body()
        self.sent.append(Sent(request.method, request.url.path, pairs, headers, body))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "this service wants a key")
        fault = self.faults.popleft() if self.faults else None
        if fault is None:
            return self._answer(self.sent[-1])
        if fault.is_late:
            self._answer(self.sent[-1])
        announced = {"Content-Length": str(len(fault.body) + fault.missing_bytes)}
        return StreamingResponse(_trickle(fault), fault.status, {**fault.headers, **announced})

    def _answer(self, sent: Sent) -> Response:
        match sent.method, sent.path.split("/")[2:]:
            case "GET", ["options"]:
                return JSONResponse(OPTIONS)
            case "POST", ["jobs"]:
                return self._submit(sent)
            case "GET", ["jobs"]:
                return self._list(sent)
            case "GET", ["jobs", "compare"]:
                return self._compare(sent)
            case "GET", ["events"]:
                return self._events()
            case _, ["jobs", job_id, *_] if job_id not in self.jobs:
                return _error(404, f"there is no job {job_id}")
            case "GET", ["jobs", job_id]:
                return JSONResponse(self._look_at(job_id))
            case "GET", ["jobs", job_id, "log"]:
                return self._log(sent, self.logs.get(job_id, b""))
            case "GET", ["jobs", _, "metrics"]:
                return JSONResponse({"metrics": [{"epoch": 1, "val_accuracy": 0.9, "best": None}]})
            case "GET", ["jobs", job_id, "events"]:
                return self._events(job_id)
            case "POST", ["jobs", job_id, action]:
                return self._act(sent, self.jobs[job_id], action)
            case _:
                return JSONResponse({"detail": "Not Found"}, 404)

    def _submit(self, sent: Sent) -> Response:
        key = sent.headers["idempotency-key"]
        if key in self._known:
            return JSONResponse(self._known[key], 201)
        said = sent.json
        varied: dict[str, list[Any]] = said.pop("sweep", {})
        name = said.pop("name", "digits-cnn")
        if said.get("values", {}).get("optim.lr", 1) <= 0:
            return _error(400, "optim.lr=-1: must be above 0 and at most 100")
        if not varied:
            answer = self.jobs[self.add(name=name, **said)]
        else:
            sweep = f"sweep{next(self._sweeps)}"
            ids = [
                self.add(
                    name=name,
                    sweep=sweep,
                    sweep_values=dict(zip(varied, combination, strict=True)),
                    **said,
                )
                for combination in itertools.product(*varied.values())
            ]
            answer = {
                "kind": "sweep",
                "id": sweep,
                "name": name,
                "jobs": [self.jobs[job_id] for job_id in ids],
            }
        self._known[key] = answer
        return JSONResponse(answer, 201)

    def _list(self, sent: Sent) -> Response:
        asked = dict(sent.query)
        states = [value for key, value in sent.query if key == "state"]
        for job_id in self.jobs:
            self._look_at(job_id)
        found = [
            job
            for job in reversed(self.jobs.values())
            if (not states or job["state"] in states)
            and all(job[key] == asked[key] for key in ("name", "sweep", "owner") if key in asked)
            and (not job["archived"] or "archived" in asked)
        ]
        first, limit = int(asked.get("cursor", 0)), int(asked.get("limit", 50))
        rest = first + limit
        counts = dict.fromkeys(("running", "queued"), 0)
        for job in found:
            counts[job["state"]] = counts.get(job["state"], 0) + 1
        return JSONResponse(
            {
                "jobs": found[first:rest],
                "next": str(rest) if rest < len(found) else None,
                "total": len(found),
                "counts": counts,
            }
        )

    def _look_at(self, job_id: str) -> dict[str, Any]:
        job = self.jobs[job_id]
        if self.looks.get(job_id):
            job.update(self.looks[job_id].popleft())
        return job

    def _compare(self, sent: Sent) -> Response:
        ids = dict(sent.query)["ids"].split(",")
        if unknown := [job_id for job_id in ids if job_id not in self.jobs]:
            return _error(404, f"there is no job {unknown[0]}")
        jobs = [self.jobs[job_id] for job_id in ids]
        return JSONResponse(
            {
                "jobs": [
                    {key: job[key] for key in ("id", "name", "objective", "metrics")}
                    for job in jobs
                ],
                "keys": {"norm": {job_id: f"n{i}" for i, job_id in enumerate(ids)}},
                "groups": [
                    {
                        "values": {"norm": f"n{i}"},
                        "ids": [job_id],
                        "n": 3,
                        "mean": {"val_accuracy": 0.95},
                        "deviation": {"val_accuracy": 0.01},
                    }
                    for i, job_id in enumerate(ids)
                ],
            }
        )

    def _log(self, sent: Sent, log: bytes) -> Response:
        asked = dict(sent.query)
        first = int(asked["offset"])
        first = max(0, len(log) + first) if first < 0 else first
        part = log[first : first + min(int(asked["limit"]), self.log_bytes)]
        headers = {"X-Log-Offset": str(first + len(part)), "X-Log-Size": str(len(log))}
        return Response(part, media_type="text/plain", headers=headers)

    def _events(self, job_id: str | None = None) -> Response:
        script: Iterable[bytes | None] = self.streams.popleft() if self.streams else ()
        if job_id is not None and not script:
            job = self._look_at(job_id)
            script = [] if job["ended"] is None else [event("end", {"state": job["state"]}, 1)]
        return StreamingResponse(_play(script), media_type="text/event-stream")

    def _act(self, sent: Sent, job: dict[str, Any], action: str) -> Response:
        if action not in job["actions"]:
            return _error(409, f"a job that is {job['state']} cannot do that: {action}")
        if action == "archive":
            job["archived"] = True
        elif action == "publish":
            job["published"] = [{"model": sent.json.get("model", job["name"]), "version": 1}]
        elif job["state"] == "running" and action in ("cancel", "pause"):
            job["wanted"] = _NEXT[action]
        else:
            job["state"] = _NEXT[action]
        return JSONResponse(job, 202)


def event(kind: str, data: Any, number: object = "") -> bytes:
    """Return an event as it is sent."""
    return f"event: {kind}\ndata: {json.dumps(data)}\nid: {number}\n\n".encode()


@contextmanager
def serving(fake: FakeJobs) -> Generator[str]:
    """Serve it on a free port of this machine, and yield its URL."""
    app = Starlette(routes=[Route("/{path:path}", fake.answer, methods=["GET", "POST"])])
    config = uvicorn.Config(
        app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + _DEADLINE_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()


class _BrokenOffError(Exception):
    """What ends a connection without an end of its answer."""


def never_ending(*parts: bytes) -> Iterator[bytes | None]:
    """Return what a stream is sent that then says nothing for longer than any test takes."""
    yield from parts
    for _ in range(100 * _DEADLINE_S):
        yield b""


async def _play(script: Iterable[bytes | None]) -> AsyncGenerator[bytes]:
    for part in script:
        if part is None:
            raise _BrokenOffError
        if part:
            yield part
        else:
            await asyncio.sleep(0.01)


async def _trickle(fault: Fault) -> AsyncGenerator[bytes]:
    if fault.delay_s == 0:
        yield fault.body
        return
    for byte in fault.body:
        yield bytes([byte])
        await asyncio.sleep(fault.delay_s)


def _error(status: int, said: str) -> Response:
    return JSONResponse({"error": said}, status)
