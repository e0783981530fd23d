"""What a service says of training jobs that takes none."""

from fastapi import APIRouter, Request, Response

from service.errors import NotFoundError

router = APIRouter(include_in_schema=False)


@router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
async def refuse(request: Request) -> Response:
    """Say how the service would take jobs."""
    raise NotFoundError("this service takes no jobs; start it with --jobs DIRECTORY")
