"""`create_app`: the service's parts wired together, and their lifespan."""

import ctypes
import gc
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service import logs
from service.access import Doorkeeper
from service.auth import Keys
from service.errors import ServiceError
from service.jobs.control_plane import ControlPlane
from service.jobs.schemas import Submission
from service.jobs.streams import Streams
from service.metrics import Metrics
from service.middleware import Gate
from service.models.data_plane import DataPlane
from service.models.desired_state import DesiredState
from service.models.model import Compute, ServedModel, load_model
from service.models.registry import Registry
from service.routes import events, health, inference, jobs, no_jobs, pages, predict, repository
from service.routes.responses import error_answer
from service.settings import Settings
from service.stopping import told_to_stop

_NOT_TRACED = ("/v2/health/", "/metrics", "/static/")
_M_ARENA_MAX = -8  # of <malloc.h>


def create_app(
    settings: Settings | None = None, *, state_dir: Path | None = None, strict: bool = True
) -> FastAPI:
    """Return the service; its models are loaded when it starts.

    Args:
        settings: None means from the environment, as for `uvicorn --factory`.
        state_dir: what the workers of one service share; None: there is one worker.
        strict: whether not to start where there are bundles and none of them can be loaded.

    Raises:
        pydantic.ValidationError: a setting in the environment is missing or wrong.
        KeysFileError: the file of keys cannot be read.
        JobSettingsError: the administrator's settings of jobs are not valid.
    """
    chosen = settings or Settings()  # pyright: ignore[reportCallIssue] -- the environment has the rest
    keys = None if chosen.api_keys is None or chosen.no_auth else Keys(chosen.api_keys)
    metrics = Metrics()
    registry: Registry[ServedModel] = Registry(
        chosen.models,
        partial(
            load_model,
            compute=_compute(chosen),
            metrics=metrics,
            allow_imports=chosen.allow_imports,
        ),
        versions=chosen.versions,
        poll_s=chosen.poll_s,
        desired_state=DesiredState(state_dir),
        observer=metrics,
    )

    plane = None if chosen.jobs is None else ControlPlane(chosen.jobs, timeout_s=chosen.timeout_s)
    streams = Streams(chosen.max_streams)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        # Forwards that run on this thread are of models too small for several.
        torch.set_num_threads(1)
        if not registry.is_open:
            await registry.open(strict=strict)
        gc.collect()
        gc.freeze()  # or every full collection would walk all that torch has loaded
        try:
            with told_to_stop(streams.close):
                yield
        finally:
            streams.close()
            if plane is not None:
                plane.close()
            await registry.close()

    app = FastAPI(
        title="syncbn",
        version=version("syncbn"),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        telemetry={
            "auto_configure": chosen.telemetry,
            "metrics": False,  # Prometheus has them
            "logs": False,
            "exclude": lambda scope: scope["path"].startswith(_NOT_TRACED),
        },
    )
    app.state.settings = chosen
    app.state.metrics = metrics
    app.state.registry = registry
    app.state.control_plane = plane
    app.state.streams = streams
    app.state.data_plane = DataPlane(
        registry,
        metrics,
        timeout_s=chosen.timeout_s,
        max_request_rows=chosen.max_request_rows,
        max_answer_bytes=chosen.max_answer_bytes,
        max_image_pixels=chosen.max_image_pixels,
    )
    for plain in (inference.plain_router, predict.router, repository.router):
        app.router.routes.extend(plain.routes)
    of_jobs = (no_jobs.router,) if plane is None else (jobs.router, events.router)
    for router in (inference.router, health.router, pages.router, *of_jobs):
        app.include_router(router)
    app.add_middleware(
        Gate,
        keys=keys,
        doorkeeper=Doorkeeper(chosen.host, chosen.allowed_hosts, chosen.cors_origins),
        metrics=metrics,
        max_body_bytes=chosen.max_body_bytes,
        write_line=logs.request_line,
    )
    if chosen.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=chosen.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                *(inference.JSON_BYTES, jobs.LOG_OFFSET, jobs.LOG_SIZE),
                *("Retry-After", "X-Request-Id"),
            ],
        )
    _describe(app, with_keys=keys is not None, with_jobs=plane is not None)

    # The middleware answers those of our own; here are FastAPI's.
    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        refusal = ServiceError(f"{request.method} {request.url.path}: {error.detail}")
        refusal.status = error.status_code
        return error_answer(refusal)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(request: Request, error: RequestValidationError) -> Response:
        reasons = (
            f"{'.'.join(str(part) for part in each['loc'][1:])}={str(each.get('input'))[:80]}: "
            f"{each['msg']}"
            for each in error.errors()
        )
        refusal = ServiceError(f"{request.method} {request.url.path}: {'; '.join(reasons)}")
        refusal.status = 400
        return error_answer(refusal)

    return app


def prepare_process() -> None:
    """Set what holds for a whole process that serves, before it has other threads.

    Memory that one thread frees is used by the others then; glibc would keep it apart for each,
    which costs half the throughput where one loads a model and another computes with it.
    """
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _compute(settings: Settings) -> Compute:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and settings.dtype == "float32":
        # TF32 rounds the products' factors to 10 bits, which no check of ours would pass.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return Compute(
        device=torch.device(device),
        dtype=getattr(torch, settings.dtype),
        compile=settings.compile,
        threads=settings.threads or max(1, cores() // settings.workers),
        max_batch_size=settings.max_batch_size,
        max_queue_rows=settings.max_queue_rows,
        timeout_s=settings.timeout_s,
        drift=settings.drift,
        max_batch_bytes=settings.max_batch_bytes,
        max_queue_bytes=settings.max_queue_bytes,
    )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _describe(app: FastAPI, *, with_keys: bool, with_jobs: bool) -> None:
    """Add to the API's description what FastAPI does not see: the plain routes, and the keys."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = describe()
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            schemas.update(inference.INFERENCE_SCHEMAS)
            if with_jobs:
                schemas["Submission"] = Submission.model_json_schema()
            # What FastAPI answers with 422, we answer with 400.
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            if with_keys:
                components["securitySchemes"] = {
                    "Authorization": {"type": "http", "scheme": "bearer"},
                    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                }
                document["security"] = [{"Authorization": []}, {"X-API-Key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi
