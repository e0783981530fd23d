"""The head of a Ray cluster in a world of jobs: it loses, delays and repeats what it is told."""

from typing import Any

from syncbn.jobs.engines.http import Answer
from tests.support.job_world import World

# How many requests later something is done that was thought to be lost.
_LATE = 4


class FakeRay:
    """Answers as Ray Jobs does; what is pending there are the starts of the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[str, dict[str, Any]] = {}
        self._late: list[tuple[int, dict[str, Any]]] = []
        self._calls = 0
        self.submissions: list[dict[str, Any]] = []
        self.fails: OSError | None = None

    def __call__(self, method: str, path: str, body: Any = None) -> Answer:
        """Answer a request, before and after which the dispatcher may be killed."""
        if self.fails is not None:
            raise self.fails
        self._calls += 1
        for due, late in self._late:
            if due == self._calls:
                self._accept(late, is_slow=True)
        self._world.point()
        if path.startswith("/api/v0/"):
            answer = Answer(200, _machines())
        elif path == "/api/jobs/":
            answer = self._submit(body) if method == "POST" else self._list()
        else:
            name = path.removeprefix("/api/jobs/").removesuffix("/stop")
            answer = self._stop(name) if method == "POST" else self._delete(name)
        self._world.point()
        return answer

    def restart(self) -> None:
        """Forget all jobs, as a head does that is started anew; their processes end."""
        for job in sorted(self._world.running):
            self._world.end(job, None)
        self._world.starts.clear()
        self._known.clear()

    def give_up(self, name: str) -> None:
        """Let a job that has not begun fail, as Ray does after a quarter of an hour."""
        self._world.starts.remove(_attempt(name))
        self._known[name] |= {
            "status": "FAILED",
            "error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
            "message": "Job supervisor actor failed to start within 900.0 seconds.",
        }

    def _submit(self, body: dict[str, Any]) -> Answer:
        fault = self._world.fault("start")
        if fault == "lost":
            raise TimeoutError("timed out")
        if fault == "late":
            self._late.append((self._calls + _LATE, body))
            raise TimeoutError("timed out")
        answer = self._accept(body, is_slow=fault == "slow")
        return self._accept(body, is_slow=False) if fault == "repeated" else answer

    def _accept(self, body: dict[str, Any], is_slow: bool) -> Answer:
        name = body["submission_id"]
        if name in self._known:
            return Answer(
                500, f"Traceback (most recent call last):\nValueError: {name} already exists."
            )
        self.submissions.append(body)
        self._known[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "metadata": body["metadata"],
            "error_type": None,
        }
        self._world.starts.append(_attempt(name))
        if not is_slow:
            self._world.deliver(len(self._world.starts) - 1)
        return Answer(200, {"job_id": name, "submission_id": name})

    def _list(self) -> Answer:
        fault = self._world.fault("observe")
        if fault == "lost":
            raise TimeoutError("timed out")
        if fault == "late":
            return Answer(500, "Traceback (most recent call last):\nRuntimeError: no head")
        driver = {"type": "DRIVER", "submission_id": None, "status": "RUNNING"}
        listed = [job | {"status": self._status(job)} for job in self._known.values()]
        return Answer(200, [*listed, driver])

    def _status(self, job: dict[str, Any]) -> str:
        attempt = _attempt(job["submission_id"])
        if attempt in self._world.starts:
            return "PENDING"
        if self._world.running.get(attempt[0]) == attempt[1]:
            return "RUNNING"
        return job.get("status", "SUCCEEDED")

    def _stop(self, name: str) -> Answer:
        # The engine kills as it stops, and Ray itself kills what does not heed.
        faults = [self._world.fault("stop"), self._world.fault("kill")]
        if "lost" in faults or "late" in faults:
            raise TimeoutError("timed out")
        if name not in self._known:
            return Answer(404, f"Job {name} does not exist")
        job, number = _attempt(name)
        if self._world.running.get(job) == number:
            if (job, number) in self._world.told:
                self._world.end(job, None)
            else:
                self._world.told.add((job, number))
        return Answer(200, {"stopped": True})

    def _delete(self, name: str) -> Answer:
        job = self._known.get(name)
        if job is None:
            return Answer(404, f"Job {name} does not exist")
        if self._status(job) in ("PENDING", "RUNNING"):
            return Answer(500, "RuntimeError: it is in a non-terminal state")
        del self._known[name]
        return Answer(200, {"deleted": True})


def _machines() -> dict[str, Any]:
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 4.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0}},
    ]
    return {"data": {"result": {"result": nodes}}}


def _attempt(name: str) -> tuple[str, int]:
    _, job, number = name.split("-")
    return job, int(number)
