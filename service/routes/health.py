"""Whether the server lives, whether it is ready, and what it is."""

from fastapi import APIRouter, Request

from service.schemas import ServerLive, ServerMetadata, ServerReady

router = APIRouter(tags=["health"])


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
    return ServerMetadata(name="syncbn", version=request.app.version, extensions=[])
