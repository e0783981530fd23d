"""What is asked of Ray, how often, and what is made of its answers."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from syncbn.errors import EngineError, JobError
from syncbn.jobs.engines.http import Answer, HttpServer
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.engines.ray import RayEngine, RayOptions
from tests.support.fake_ray import FakeRay
from tests.support.job_world import Clock, World


def _attempt(job: str = "abc", nproc: int = 2, cores: int = 2, gpus: int = 0) -> Attempt:
    return Attempt(
        job=job,
        number=3,
        directory=Path("/jobs/$(touch x)/work") / job,
        cores=(),
        gpus=(),
        cores_wanted=cores,
        gpus_wanted=gpus,
        nproc=nproc,
    )


class Bench:
    """An engine in a world."""

    def __init__(self, ranks_per_node: int | None = None) -> None:
        self.clock, self.world = Clock(), World()
        self.world.permits["abc"] = 3
        self.ray = FakeRay(self.world)
        environment = {"PATH": "/bin", "PYTHONPATH": "/src", "CUDA_VISIBLE_DEVICES": "0"}
        options = RayOptions(Path("/jobs"), environment, "/python", ranks_per_node)
        self.engine = RayEngine(options, self.ray, lambda: self.clock.steady)


def test_job_is_told_its_threads_and_has_time_to_stop() -> None:
    bench = Bench()
    bench.engine.start(_attempt(cores=6, gpus=2))
    (sent,) = bench.ray.submissions
    words = shlex.split(sent["entrypoint"])
    assert words[:4] == ["exec", "/python", "-m", "syncbn.train.launch.batch"]
    assert words[4] == "/jobs/$(touch x)/work/abc/run"
    assert words[words.index("--threads") + 1] == "3"
    assert words[words.index("--console") + 1] == "/jobs/$(touch x)/work/abc/console.log"
    assert "--with-parent" in words
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_num_gpus"]) == (6, 2)
    # Ray's own are 3 s; and which GPUs and programs there are is for its machines to say.
    variables = sent["runtime_env"]["env_vars"]
    assert variables.pop("RAY_JOB_STOP_WAIT_TIME_S") == "60"
    assert variables == {"PYTHONPATH": "/src", "PYTHONSAFEPATH": "1"}


def test_job_of_several_machines_asks_for_a_share_of_each() -> None:
    bench = Bench(ranks_per_node=2)
    bench.engine.start(_attempt(nproc=4, cores=8, gpus=4))
    (sent,) = bench.ray.submissions
    words = shlex.split(sent["entrypoint"])
    assert words[2:12] == [
        *("-m", "syncbn.jobs.engines.ray_nodes", "--nodes=2", "--ranks=2", "--cores=4"),
        *("--gpus=2", "--", "/python", "-m", "syncbn.train.launch.batch"),
    ]
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_num_gpus"]) == (0, 0)


def test_repeated_start_starts_nothing() -> None:
    bench = Bench()
    assert bench.engine.start(_attempt()) == "syncbn-abc-3"
    assert bench.engine.start(_attempt()) == "syncbn-abc-3"
    assert len(bench.ray.submissions) == 1


def test_job_that_ray_does_not_know_is_gone_and_why() -> None:
    bench = Bench()
    bench.engine.start(_attempt())
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.alive}
    bench.ray.restart()
    bench.clock.pass_by(1)
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}
    assert "its head may have been started anew" in bench.engine.explain(_attempt())


@pytest.mark.parametrize(
    ("cores", "why"),
    [(4, "for 4 CPUs that are free on one machine"), (5, "in vain: no machine has 5 CPUs")],
)
def test_job_that_waits_says_for_what(cores: int, why: str) -> None:
    bench = Bench()
    bench.world.faults["start"] = ["slow"]
    bench.engine.start(_attempt(cores=cores))
    assert bench.engine.observe([_attempt(cores=cores)]) == {"abc": Presence.waiting}
    assert bench.engine.explain(_attempt(cores=cores)) == why


def test_job_that_ray_gave_up_before_it_began_was_not_lost() -> None:
    bench = Bench()
    bench.world.faults["start"] = ["slow"]
    bench.engine.start(_attempt())
    bench.ray.give_up("syncbn-abc-3")
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.dropped}
    assert bench.engine.explain(_attempt()).startswith("Job supervisor actor failed to start")


def test_what_is_over_is_removed_from_ray_and_nothing_else() -> None:
    bench = Bench()
    other = RayEngine(RayOptions(Path("/other"), {}), bench.ray)
    other.start(_attempt("ofothers"))
    bench.engine.start(_attempt())
    bench.world.running.clear()
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}
    bench.clock.pass_by(1)
    bench.engine.observe([])
    listed = bench.ray("GET", "/api/jobs/").content
    assert [job["submission_id"] for job in listed] == ["syncbn-ofothers-3", None]


def test_head_that_does_not_answer_is_left_alone_for_a_while() -> None:
    bench = Bench()
    bench.ray.fails = ConnectionRefusedError("refused")
    assert bench.engine.observe([_attempt()]) == {}
    bench.ray.fails = None
    with pytest.raises(EngineError, match="Ray does not answer: refused"):
        bench.engine.start(_attempt())
    bench.clock.pass_by(5)
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}


def test_missing_token_is_said() -> None:
    def http(method: str, path: str, body: Any = None) -> Answer:
        return Answer(401, "Unauthorized: Missing authentication token")

    engine = RayEngine(RayOptions(Path("/jobs"), {}), http)
    with pytest.raises(EngineError, match="it wants a token, in the variable RAY_AUTH_TOKEN"):
        engine.start(_attempt())


@pytest.mark.parametrize("url", ["ray://head:10001", "head:8265", "http://", "http://head:port"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(JobError, match="must be as http://HOST:PORT"):
        HttpServer(url, "", 1)


class _Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        said = {"path": self.path, "body": body, "token": self.headers.get("Authorization")}
        content = b"no JSON" if self.path.endswith("/text") else json.dumps(said).encode()
        self.send_response(500 if self.path.endswith("/text") else 200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/prefix/"
        finally:
            server.shutdown()
            thread.join()


def test_request_carries_json_and_the_token(echo: str) -> None:
    ask = HttpServer(echo, "secret", 10)
    answer = ask("POST", "/api", {"a": [1]})
    assert answer == Answer(
        200, {"path": "/prefix/api", "body": '{"a": [1]}', "token": "Bearer secret"}
    )
    assert ask("POST", "/text") == Answer(500, "no JSON")


def test_server_that_is_not_there_is_an_error(echo: str) -> None:
    with pytest.raises(OSError, match="refused"):
        HttpServer("http://127.0.0.1:1", "", 10)("GET", "/")
