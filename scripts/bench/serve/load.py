"""The load generator: a process that is told what to send, and tells what came back."""

import asyncio
import gc
import math
import re
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
import uvloop

from scripts.bench.serve.wires import Array, Wire
from scripts.bench.serve.workloads import SAMPLES, TOLERANCE

ANSWER_TIMEOUT_S = 10
RAMP_S = 0.3  # of a slice, before it is counted


@dataclass(frozen=True)
class Slice:
    """What the load generator does next.

    Attributes:
        port: of the server, on loopback.
        wire: how it is asked.
        samples: the file of samples and what they must give.
        connections: how many ask at the same time.
        seconds: for how long it is counted, after a short ramp.
    """

    port: int
    wire: Wire
    samples: Path
    connections: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """What came of a slice: answers a second, times in milliseconds, and what went wrong."""

    rate: float
    p50_ms: float
    p99_ms: float
    errors: int
    error: str
    own_cpu: float


class _Traffic:
    """What the connections of a slice share.

    Args:
        wire: how the server is asked.
        samples: what to send, over and over.
        expected: the probabilities of each.
    """

    _LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)

    def __init__(self, wire: Wire, samples: Array, expected: Array) -> None:
        self._wire = wire
        self._expected = expected
        # An answer that was found right need not be read again. The same sample may give several,
        # as float32 sums depend on what else is in a batch.
        self._right: set[tuple[int, bytes]] = set()
        self.requests = [self._request(sample[np.newaxis]) for sample in samples]
        self.finished: list[tuple[float, float]] = []
        self.errors: list[str] = []

    def _request(self, sample: Array) -> bytes:
        body, headers = self._wire.encode(sample)
        lines = [f"POST {self._wire.path} HTTP/1.1", "Host: localhost"]
        lines += [f"{key}: {value}" for key, value in {**self._wire.headers, **headers}.items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        return head.encode() + body

    def length(self, head: bytes) -> int | None:
        """Return the length of an answer's body, if its head says so."""
        match = self._LENGTH.search(head)
        return int(match[1]) if match else None

    def check(self, which: int, head: bytes, body: bytes) -> None:
        """Note an error unless an answer is 200 and holds a sample's probabilities."""
        if head[9:12] != b"200":
            self.errors.append(f"{head[9:].splitlines()[0].decode()}: {body[:200]!r}")
            return
        if (which, body) in self._right:
            return
        lines = (line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:])
        try:
            answer = self._wire.decode({k.lower(): v for k, _, v in lines}, body).ravel()
            expected = self._expected[which]
            right = answer.shape == expected.shape and np.allclose(answer, expected, 0, TOLERANCE)
        except Exception as error:  # whatever the body made of it
            self.errors.append(f"{type(error).__name__}: {error}: {body[:200]!r}")
            return
        if not right:
            self.errors.append(f"sample {which}: {answer} instead of {expected}")
        elif len(self._right) < 10_000:
            self._right.add((which, body))


class _Client(asyncio.Protocol):
    """One connection: sends a request as soon as the last is answered.

    Args:
        traffic: of the slice.
        number: of the connection, which says with which sample it begins.
    """

    def __init__(self, traffic: _Traffic, number: int) -> None:
        self._traffic = traffic
        self._number = number
        self._sent_at = 0.0
        self._received = bytearray()
        self._head_bytes = self._bytes = 0
        self._transport: asyncio.Transport | None = None
        self.stopping = False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        assert self._transport
        self._sent_at = time.perf_counter()
        self._transport.write(self._traffic.requests[self._number % SAMPLES])

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._bytes:
            head_bytes = received.find(b"\r\n\r\n") + 4
            if head_bytes < 4:
                return
            length = self._traffic.length(bytes(received[:head_bytes]))
            if length is None:
                self.give_up(f"no Content-Length: {bytes(received[:head_bytes])!r}")
                return
            self._head_bytes, self._bytes = head_bytes, head_bytes + length
        if len(received) < self._bytes:
            return
        now = time.perf_counter()
        traffic = self._traffic
        traffic.finished.append((now, now - self._sent_at))
        head, body = bytes(received[: self._head_bytes]), bytes(received[self._head_bytes :])
        received.clear()
        self._bytes = 0
        traffic.check(self._number % SAMPLES, head, body)
        self._number += 1
        if self.stopping:
            self._end()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.give_up(f"the connection was closed: {exc or 'by the server'}")

    def give_up(self, error: str) -> None:
        """Note an error, and end."""
        self._traffic.errors.append(error)
        self._end()

    def _end(self) -> None:
        self.over.set_result(None)
        if self._transport:
            self._transport.abort()


async def _run_slice(wanted: Slice, traffic: _Traffic) -> Load:
    loop = asyncio.get_running_loop()
    begin = time.perf_counter() + RAMP_S
    end = begin + wanted.seconds
    cpu_s = time.process_time()
    clients: list[_Client] = []
    for number in range(wanted.connections):
        _, client = await loop.create_connection(
            lambda number=number: _Client(traffic, number), "127.0.0.1", wanted.port
        )
        clients.append(client)
    await asyncio.sleep(end - time.perf_counter())
    cpu_s = time.process_time() - cpu_s
    for client in clients:
        client.stopping = True
    await asyncio.wait([client.over for client in clients], timeout=ANSWER_TIMEOUT_S)
    for client in clients:
        if not client.over.done():
            client.give_up(f"no answer within {ANSWER_TIMEOUT_S} s")
    times = sorted(took for at, took in traffic.finished if begin <= at < end) or [math.nan]
    return Load(
        rate=sum(begin <= at < end for at, _ in traffic.finished) / wanted.seconds,
        p50_ms=times[len(times) // 2] * 1e3,
        p99_ms=times[len(times) * 99 // 100] * 1e3,
        errors=len(traffic.errors),
        error=next(iter(traffic.errors), ""),
        own_cpu=cpu_s / (RAMP_S + wanted.seconds),
    )


def be_load_generator(pipe: Connection) -> None:
    """Answer each slice that comes through a pipe with its load, until None comes."""
    gc.disable()  # a slice leaves little behind, and a collection would look like a slow server
    traffics: dict[str, _Traffic] = {}
    while wanted := pipe.recv():
        assert isinstance(wanted, Slice)
        key = f"{wanted.port} {wanted.wire}"
        if key not in traffics:
            with np.load(wanted.samples) as file:
                traffics[key] = _Traffic(wanted.wire, file["samples"], file["expected"])
        traffic = traffics[key]
        traffic.finished.clear()
        traffic.errors.clear()
        try:
            pipe.send(uvloop.run(_run_slice(wanted, traffic)))
        except OSError as error:  # nobody listens any more
            pipe.send(Load(0, math.nan, math.nan, 1, str(error), 0))
        gc.collect()
