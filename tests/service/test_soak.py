"""An hour's worth of mixed load in a minute or two: nothing wrong, nothing lost, nothing left."""

import asyncio
import gc
import json
import multiprocessing
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from syncbn.bundle import read_bundle
from tests.service.conftest import write_small_bundle

REQUESTS = 100_000
CONNECTIONS = 24
SAMPLES = 64
DEADLINE_S = 900
MAX_BODY_BYTES = 20_000
KINDS = {
    "raw": 40,
    "json": 35,
    "rows": 10,
    "malformed": 7,
    "cancelled": 5,
    "oversized": 2,
    "slow": 1,
}
NEW_VERSION_S = 1.0


@dataclass
class Server:
    """A service in a thread of this process, so that its tasks can be counted."""

    app: FastAPI
    port: int
    loop: asyncio.AbstractEventLoop | None = None

    def tasks(self) -> list[str]:
        """Return the names of its tasks' coroutines."""
        assert self.loop is not None
        future = asyncio.run_coroutine_threadsafe(_task_names(), self.loop)
        return future.result(60)


async def _task_names() -> list[str]:
    return sorted(str(task.get_coro()) for task in asyncio.all_tasks())


@contextmanager
def _serving(models: Path) -> Generator[Server]:
    settings = Settings(
        models=models, poll_s=0.1, max_body_bytes=MAX_BODY_BYTES, timeout_s=20, versions=2
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(create_app(settings), listener.getsockname()[1])
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, timeout_graceful_shutdown=20
    )
    runner = uvicorn.Server(config)

    async def serve() -> None:
        server.loop = asyncio.get_running_loop()
        await runner.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        deadline = time.monotonic() + 120
        while not runner.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server
    finally:
        runner.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


def _write_version(models: Path, version: int) -> None:
    """Publish a version; odd ones and even ones are different models."""
    temporary = models / f".{version}"
    write_small_bundle(temporary, "shapes", seed=version % 2)
    temporary.rename(models / "shapes" / str(version))


class _Traffic:
    """The clients, in a process of their own.

    Args:
        port: of the service.
        samples: shape (SAMPLES, 1, 4, 4).
        expected: the probabilities of each, by the version's parity.
        requests: how many to send.
    """

    def __init__(self, port: int, samples: Any, expected: list[Any], requests: int) -> None:
        self.port = port
        self.samples = samples
        self.expected = expected
        self.left = requests
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []

    async def run(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(self._client(number) for number in range(CONNECTIONS)))

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        reader = writer = None
        while self.left > 0:
            self.left -= 1
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            assert reader is not None
            try:
                stays = await getattr(self, f"_{kind}")(reader, writer, rng)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.errors.append(f"{kind}: lost: {error!r}")
                stays = False
            self.counts[kind] += 1
            if not stays:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
                writer = None
        if writer is not None:
            writer.close()

    async def _raw(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        which = rng.randrange(SAMPLES)
        body = self.samples[which].tobytes()
        self._send(writer, body, {"Inference-Header-Content-Length": "0"})
        status, headers, answer = await self._receive(reader)
        if status != 200:
            self.errors.append(f"raw: {status} {answer[:200]!r}")
            return True
        length = int(headers[b"inference-header-content-length"])
        head = json.loads(answer[:length])
        values = np.frombuffer(answer, np.float32, 3, length)
        self._check(head["model_version"], [which], values)
        return True

    async def _json(self, reader: Any, writer: Any, rng: random.Random, rows: int = 1) -> bool:
        which = [rng.randrange(SAMPLES) for _ in range(rows)]
        tensor = {"name": "image", "shape": [rows, 1, 4, 4], "datatype": "FP32"}
        data = {"data": self.samples[which].ravel().tolist()}
        body = json.dumps({"inputs": [tensor | data], "id": str(which)}).encode()
        self._send(writer, body)
        status, _, answer = await self._receive(reader)
        if status != 200:
            self.errors.append(f"json: {status} {answer[:200]!r}")
            return True
        content = json.loads(answer)
        if content["id"] != str(which):
            self.errors.append(f"json: the answer to {content['id']} instead of {which}")
        self._check(content["model_version"], which, content["outputs"][0]["data"])
        return True

    async def _rows(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        return await self._json(reader, writer, rng, rng.randint(2, 40))

    async def _malformed(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        body = bytearray(json.dumps({"inputs": [{"name": "image", "shape": [1]}]}).encode())
        body[rng.randrange(len(body))] = rng.randrange(256)
        headers = {"Inference-Header-Content-Length": str(rng.randrange(100))}
        self._send(writer, bytes(body), headers if rng.random() < 0.5 else {})
        status, _, answer = await self._receive(reader)
        if status != 400 or list(json.loads(answer)) != ["error"]:
            self.errors.append(f"malformed: {status} {answer[:200]!r}")
        return True

    async def _oversized(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        self._send(writer, bytes(MAX_BODY_BYTES + 1))
        status, _, _ = await self._receive(reader)
        if status != 413:
            self.errors.append(f"oversized: {status}")
        return False

    async def _cancelled(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        body = self.samples[0].tobytes()
        self._send(writer, body, {"Inference-Header-Content-Length": "0"})
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.01)
        writer.transport.abort()
        return False

    async def _slow(self, reader: Any, writer: Any, rng: random.Random) -> bool:
        body = self.samples[0].tobytes()
        head = self._head(len(body), {"Inference-Header-Content-Length": "0"})
        for part in (head[:20], head[20:], body[:30], body[30:]):
            writer.write(part)
            await asyncio.sleep(0.05)
        status, _, _ = await self._receive(reader)
        if status != 200:
            self.errors.append(f"slow: {status}")
        return True

    def _head(self, length: int, headers: dict[str, str]) -> bytes:
        lines = ["POST /v2/models/shapes/infer HTTP/1.1", "Host: x", f"Content-Length: {length}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def _send(self, writer: Any, body: bytes, headers: dict[str, str] | None = None) -> None:
        writer.write(self._head(len(body), headers or {}) + body)

    async def _receive(self, reader: Any) -> tuple[int, dict[bytes, bytes], bytes]:
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].split(b"\r\n")
            headers = {
                key.lower(): value.strip() for key, _, value in (x.partition(b":") for x in lines)
            }
            body = await reader.readexactly(int(headers[b"content-length"]))
        return int(first.split()[1]), headers, body

    def _check(self, version: str, which: list[int], values: Any) -> None:
        expected = self.expected[int(version) % 2][which].ravel()
        if not np.allclose(values, expected, rtol=0, atol=2e-5):
            self.errors.append(f"version {version}, samples {which}: {values}, not {expected}")


def _be_clients(pipe: Connection, *arguments: Any) -> None:
    while requests := pipe.recv():
        traffic = _Traffic(*arguments, requests=requests)
        asyncio.run(traffic.run())
        pipe.send((dict(traffic.counts), traffic.errors))


def _settled(server: Server) -> tuple[list[str], int, int, int]:
    """Return its tasks, file descriptors, threads and kilobytes, once nobody is connected."""
    deadline = time.monotonic() + 60
    while any("run_asgi" in name for name in server.tasks()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    gc.collect()
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.partition("VmRSS:")[2].split()[0])
    names = [name.partition(" at 0x")[0] for name in server.tasks()]
    return names, len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), kilobytes


@pytest.mark.long
def test_soak_with_model_reloads_throughout(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "shapes").mkdir(parents=True)
    for version in (1, 2):
        _write_version(models, version)
    samples = torch.randn(SAMPLES, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = [
        read_bundle(models / "shapes" / str(version)).probabilities(samples).numpy()
        for version in (2, 1)
    ]
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _serving(models) as server:
        client = context.Process(
            target=_be_clients, args=(theirs, server.port, samples.numpy(), expected), daemon=True
        )
        client.start()

        def send(requests: int) -> tuple[Counter[str], list[str], int]:
            """Let the clients send, and publish new versions meanwhile; return how many."""
            nonlocal version
            published = 0
            ours.send(requests)
            while not ours.poll(NEW_VERSION_S):
                assert client.is_alive()
                version += 1
                published += 1
                _write_version(models, version)
                shutil.rmtree(models / "shapes" / str(version - 3), ignore_errors=True)
            counts, errors = ours.recv()
            return Counter(counts), errors, published

        try:
            _, errors, _ = send(REQUESTS // 10)  # what is made once, is made by now
            assert errors == []
            before = _settled(server)
            counts, errors, published = send(REQUESTS)
            assert errors == []
            after = _settled(server)
        finally:
            client.kill()
            client.join()
    assert counts.total() == REQUESTS
    assert set(counts) == set(KINDS)
    assert published > 10
    what = f"{dict(counts)}, {published} versions\nbefore {before[1:]}\nafter {after[1:]}\n"
    sys.stderr.write(what)  # for whoever runs it with -s
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 2
    assert after[3] <= before[3] * 1.1 + 10_000
