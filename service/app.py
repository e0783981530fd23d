"""`create_app`: the service's parts wired together, and their lifespan."""

import gc
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import ServiceError
from service.inference import DataPlane
from service.registry import load_registry
from service.routes import health, inference
from service.schemas import ErrorBody
from service.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the service with its models loaded.

    Args:
        settings: None means from the environment, as for `uvicorn --factory`.

    Raises:
        BundleError: a model cannot be loaded.
        pydantic.ValidationError: a setting in the environment is missing or wrong.
    """
    chosen = settings or Settings()  # pyright: ignore[reportCallIssue] -- the environment has the rest
    if chosen.threads > 0:
        torch.set_num_threads(chosen.threads)
    registry = load_registry(chosen.models, allow_imports=chosen.allow_imports)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        with ThreadPoolExecutor(1, thread_name_prefix="inference") as executor:
            app.state.settings = chosen
            app.state.data_plane = DataPlane(
                registry, executor, chosen.timeout_s, chosen.max_batch_size
            )
            gc.collect()
            gc.freeze()  # or every full collection would walk all that torch has loaded
            yield

    app = FastAPI(
        title="syncbn", version=version("syncbn"), lifespan=lifespan, redirect_slashes=False
    )
    app.include_router(health.router)
    app.include_router(inference.router)

    # Clients of the protocol fail on any other error body than {"error": …}.
    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> JSONResponse:
        return _error(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, f"{request.method} {request.url.path}: {error}")

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error(500, "internal error; the server's log says more")

    return app


def _error(status: int, message: str) -> JSONResponse:
    # What a client sent may be quoted in it, at any length.
    return JSONResponse(ErrorBody(error=message[:1000]).model_dump(), status)
