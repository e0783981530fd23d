"""The service on a Ray cluster: replicas of it behind Ray Serve's proxies.

    serve run service.cluster:build models=/shared/models replicas=4

The extra `ray` brings Ray. Every replica is the whole service, and batches what reaches it.
"""

import os
from importlib import import_module
from typing import Any

from fastapi import FastAPI

from service.app import create_app, prepare_process
from service.settings import Settings

# Of an extra, which whoever checks types need not have.
serve: Any = import_module("ray.serve")
_OWN = ("replicas", "cpus", "gpus")


def build(arguments: dict[str, str]) -> Any:
    """Return the service as an application of Ray Serve.

    Args:
        arguments: `replicas` (1), `cpus` (1) and `gpus` (0) of each replica, and any option of
            `syncbn-serve` with underscores; where it listens and how many workers it has is Ray's
            affair. The models' directory must be the same on every machine.

    Raises:
        pydantic.ValidationError: an option is missing or wrong.
    """
    own = {key: value for key, value in arguments.items() if key in _OWN}
    cpus = float(own.get("cpus", 1))
    given: dict[str, Any] = {key: value for key, value in arguments.items() if key not in _OWN}
    settings = Settings.model_validate({"threads": max(1, int(cpus)), **given})

    def replica() -> FastAPI:
        # Ray gives a process as many OpenMP threads as it has CPUs, before torch is imported.
        os.environ.pop("OMP_NUM_THREADS", None)
        prepare_process()
        return create_app(settings)

    @serve.deployment(
        name="syncbn",
        num_replicas=int(own.get("replicas", 1)),
        max_ongoing_requests=settings.max_queue_rows,
        ray_actor_options={"num_cpus": cpus, "num_gpus": float(own.get("gpus", 0))},
        graceful_shutdown_timeout_s=settings.timeout_s,
    )
    @serve.ingress(replica)
    class Service:
        """One replica."""

    deployment: Any = Service
    return deployment.bind()
