"""One client that submits small jobs as fast as it is answered: a process of its own.

`python -m scripts.bench.jobs.submit URL NAME COUNT` prints {"seconds", "ids"} as JSON. A submission
that was not answered is sent again with the same key, until it is.
"""

import json
import sys
import time
from typing import Any

from syncbn.client import Job, JobsClient

# As small as a job can be: one step of one rank, on data that are made.
SMALL: dict[str, Any] = {
    "choices": {"data": "synthetic", "model": "mlp"},
    "values": {
        **{"data.samples": 32, "data.test_samples": 8, "data.size": 4, "data.channels": 1},
        **{"model.width": 4, "data.batch_size": 16, "max_steps": 1, "launch.nproc": 1},
    },
    "device": "cpu",
    "retries": 10,
}
# For one answer, while the service is started again.
_TIMEOUT_S = 600.0


def submit(url: str, name: str, count: int) -> list[str]:
    """Submit jobs called NAME-0, NAME-1 and so on, and return their identifiers."""
    ids: list[str] = []
    with JobsClient(url, timeout_s=_TIMEOUT_S, retries=100_000) as client:
        for number in range(count):
            label = f"{name}-{number}"
            job = client.submit(**SMALL, name=label, idempotency_key=label)
            assert isinstance(job, Job)
            ids.append(job.id)
    return ids


def main() -> None:
    """Submit what the command line says."""
    url, name, count = sys.argv[1:]
    start = time.perf_counter()
    ids = submit(url, name, int(count))
    print(json.dumps({"seconds": time.perf_counter() - start, "ids": ids}))


if __name__ == "__main__":
    main()
