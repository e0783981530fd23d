"""Runs jobs on a cluster of Ray, by the REST interface of Ray Jobs."""

import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.errors import EngineError
from syncbn.jobs.engines.asking import Listing, Silence
from syncbn.jobs.engines.http import Answer, Http
from syncbn.jobs.engines.nodes import Shares, batch_arguments, shares_of
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.workspace import Workspace

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_POLL_S = 1.0
# How long nobody asks a head that did not answer.
_QUIET_S = 5.0
_MACHINES_S = 30.0
# Ray would kill a job 3 s after it told it to stop; a rank has 30 s to write its state.
_STOP_S = 60
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
# Ray waits for room for 15 minutes, unless its head is told otherwise.
_NOT_BEGUN = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
_FORGOTTEN_AT_ONCE = 20
_LINE_LIMIT = 300
# Of this machine, and not of the cluster's.
_LOCAL = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TMPDIR", "COLUMNS"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "MPLCONFIGDIR"),
    }
)


@dataclass(frozen=True)
class RayOptions:
    """How jobs are handed to Ray.

    Attributes:
        store: the directory of the store, by which its jobs are told from others.
        environment: of all jobs.
        python: the interpreter on the machines.
        ranks_per_node: a job of more ranks gets several machines; None: none does.
    """

    store: Path
    environment: Mapping[str, str]
    python: str = sys.executable
    ranks_per_node: int | None = None


class RayEngine:
    """Has Ray run a supervisor for each attempt, as a job of the attempt's name.

    Ray takes a name once, so that a call that is repeated starts nothing; and the name is all that
    it needs to find an attempt again. Ray keeps what has ended for ever, and answers with all of
    it: so what is of this store and over is removed there.

    Args:
        options: how jobs are handed over.
        http: asks the head of the cluster.
        monotonic: returns seconds that never jump.
        poll_s: how old what is known of the cluster's jobs may be.
    """

    name = "ray"
    has_own_queue = True

    def __init__(
        self,
        options: RayOptions,
        http: Http,
        monotonic: Callable[[], float] = time.monotonic,
        poll_s: float = _POLL_S,
    ) -> None:
        self._options = options
        self._http = http
        self._monotonic = monotonic
        self._jobs: Listing[Mapping[str, Any]] = Listing(monotonic, poll_s)
        self._silence = Silence(monotonic, _QUIET_S)
        self._machines: list[Mapping[str, float]] = []
        self._machines_at = -math.inf

    def start(self, attempt: Attempt) -> str:
        """Hand an attempt to Ray, unless it is there; return its name."""
        self._jobs.forget()  # they are others now, whatever comes of this
        answer = self._ask("POST", "/api/jobs/", self._submission(attempt))
        if answer.status != 200 and "already exists" not in str(answer.content):
            raise EngineError(f"attempt {attempt.name} was not started: {_said(answer)}")
        return attempt.name

    def observe(self, attempts: Sequence[Attempt]) -> dict[str, Presence]:
        """Return what Ray says of its jobs, all of it by one question.

        What it does not know is gone: if its head is started anew, all jobs are.
        """
        before, jobs = self._jobs.known, self._jobs.look(self._list)
        if jobs is None:
            return {}
        if jobs is not before:
            self._forget({each.name for each in attempts}, jobs)
        return {each.job: self._presence(each, jobs.get(each.name)) for each in attempts}

    def explain(self, attempt: Attempt) -> str:
        """Return why Ray lets an attempt wait, or how it ended in Ray's words."""
        if self._jobs.known is None:
            return ""
        job = self._jobs.known.get(attempt.name)
        if job is None:
            return "Ray does not know it; its head may have been started anew"
        if job.get("status") in _ENDED:
            return _line(str(job.get("message") or ""))
        shares = shares_of(attempt, self._options.ranks_per_node)
        wanted = f"{shares.cores} CPUs" + (f" and {shares.gpus} GPUs" if shares.gpus else "")
        machines = self._known_machines()
        if machines and not any(_holds(machine, shares) for machine in machines):
            return f"in vain: no machine has {wanted}"
        several = f"each of {shares.nodes} machines" if shares.nodes > 1 else "one machine"
        return f"for {wanted} that are free on {several}"

    def stop(self, attempt: Attempt) -> None:
        """Have Ray send SIGTERM to all its processes, and kill them after a minute."""
        self._jobs.forget()
        answer = self._ask("POST", f"/api/jobs/{attempt.name}/stop")
        if answer.status not in (200, 404):
            raise EngineError(f"attempt {attempt.name} could not be told: {_said(answer)}")

    def kill(self, attempt: Attempt) -> None:
        """Do what `stop` does, as Ray knows no other way; it kills, but not at once."""
        self.stop(attempt)

    def close(self) -> None:
        """Do nothing: this process holds nothing of Ray."""

    def _submission(self, attempt: Attempt) -> dict[str, Any]:
        python = self._options.python
        shares = shares_of(attempt, self._options.ranks_per_node)
        console = str(Workspace(attempt.directory).console)
        batch = [python, "-m", "syncbn.train.launch.batch", *batch_arguments(attempt)]
        # Ray kills its own processes when it ends, and theirs only now and then.
        batch += ["--console", console, "--with-parent"]
        if shares.nodes > 1:
            sizes = [f"--{name}={value}" for name, value in vars(shares).items()]
            command = [python, "-m", "syncbn.jobs.engines.ray_nodes", *sizes, "--", *batch]
        else:
            command = batch
        environment = {
            name: value for name, value in self._options.environment.items() if name not in _LOCAL
        }
        own = {
            # What is in a directory that others write to must not be imported.
            "PYTHONSAFEPATH": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S),
        }
        several = shares.nodes > 1  # which a group of resources is made for, on the way
        return {
            "submission_id": attempt.name,
            # Ray has a shell run it, which shall not stay between Ray and the supervisor.
            "entrypoint": f"exec {shlex.join(command)}",
            "entrypoint_num_cpus": 0 if several else shares.cores,
            "entrypoint_num_gpus": 0 if several else shares.gpus,
            "runtime_env": {"env_vars": environment | own},
            "metadata": {"syncbn_store": str(self._options.store)},
        }

    def _list(self) -> dict[str, Mapping[str, Any]]:
        """Return the jobs that Ray knows, by name."""
        answer = self._ask("GET", "/api/jobs/")
        if answer.status != 200 or not isinstance(answer.content, list):
            raise EngineError(f"Ray does not list its jobs: {_said(answer)}")
        return {job["submission_id"]: job for job in answer.content if job.get("submission_id")}

    def _presence(self, attempt: Attempt, job: Mapping[str, Any] | None) -> Presence:
        if job is None:
            return Presence.gone
        if job.get("status") in _ENDED:
            return Presence.dropped if job.get("error_type") == _NOT_BEGUN else Presence.gone
        if job.get("status") == "PENDING":
            return Presence.waiting
        if shares_of(attempt, self._options.ranks_per_node).nodes > 1:
            # It runs on one machine, and waits for the others.
            has_begun = Workspace(attempt.directory).run.read_status() is not None
            return Presence.alive if has_begun else Presence.waiting
        return Presence.alive

    def _forget(self, kept: set[str], jobs: Mapping[str, Mapping[str, Any]]) -> None:
        """Remove jobs of this store from Ray that are over."""
        store = str(self._options.store)
        over = [
            name
            for name, job in jobs.items()
            if name not in kept
            and job.get("status") in _ENDED
            and (job.get("metadata") or {}).get("syncbn_store") == store
        ]
        for name in over[:_FORGOTTEN_AT_ONCE]:
            try:
                self._ask("DELETE", f"/api/jobs/{name}")
            except EngineError as error:
                log.warning("%s", error)
                return

    def _known_machines(self) -> list[Mapping[str, float]]:
        """Return what the machines of the cluster have; nothing if that is not known."""
        now = self._monotonic()
        if now - self._machines_at >= _MACHINES_S:
            self._machines_at = now
            try:
                found = self._ask("GET", "/api/v0/nodes?detail=true").content
                nodes = found["data"]["result"]["result"]
                self._machines = [
                    node["resources_total"] for node in nodes if node["state"] == "ALIVE"
                ]
            except (EngineError, KeyError, TypeError):  # another version of Ray
                self._machines = []
        return self._machines

    def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Ask the head, unless it has just failed to answer."""
        self._silence.check()
        try:
            return self._http(method, path, body)
        except OSError as error:
            raise self._silence.begin(f"Ray does not answer: {error}") from error


def _holds(machine: Mapping[str, float], shares: Shares) -> bool:
    return machine.get("CPU", 0) >= shares.cores and machine.get("GPU", 0) >= shares.gpus


def _said(answer: Answer) -> str:
    if answer.status in (401, 403):
        return "it wants a token, in the variable RAY_AUTH_TOKEN of the dispatcher"
    return f"{_line(str(answer.content))} (status {answer.status})"


def _line(text: str) -> str:
    """Return the line of a text that says most: of a traceback, the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it says nothing"]
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0])[:_LINE_LIMIT]
