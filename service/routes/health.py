"""Whether the server lives, whether it is ready, what it is, and what it has measured."""

from contextlib import suppress

from fastapi import APIRouter, Request, Response

from service.errors import ServiceError
from service.jobs.control_plane import ControlPlane
from service.schemas import ServerLive, ServerMetadata, ServerReady

router = APIRouter(tags=["health"])
_EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
]


@router.get("/v2/health/live")
async def live() -> ServerLive:
    """Answer at all."""
    return ServerLive(live=True)


@router.get("/v2/health/ready")
async def ready() -> ServerReady:
    """Answer once all models are loaded, before which nothing is accepted."""
    return ServerReady(ready=True)


@router.get("/v2")
async def server_metadata(request: Request) -> ServerMetadata:
    """Return the server's name, version and protocol extensions."""
    return ServerMetadata(name="syncbn", version=request.app.version, extensions=_EXTENSIONS)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return all metrics, as Prometheus reads them."""
    plane: ControlPlane | None = request.app.state.control_plane
    if plane is not None:
        with suppress(ServiceError):  # a disk that does not answer; all else is told
            await plane.ask(plane.measure, request.app.state.metrics)
    request.app.state.data_plane.measure_drift()
    body, content_type = request.app.state.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
