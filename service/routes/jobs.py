"""Training jobs: submitted, listed, looked at, and told what to do."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from service.errors import InvalidRequestError
from service.jobs.console import MAX_PIECE_BYTES
from service.jobs.control_plane import Selection
from service.jobs.measurements import MAX_LINES, to_csv
from service.jobs.schemas import (
    Comparison,
    JobBody,
    JobDetail,
    JobPage,
    Measurements,
    Options,
    SweepBody,
)
from service.routes.asking import Asker, Plane, read_object
from service.routes.responses import JsonResponse, refusals
from syncbn.jobs.states import Action, State

router = APIRouter(tags=["jobs"], prefix="/v1")
LOG_OFFSET, LOG_SIZE = "X-Log-Offset", "X-Log-Size"
_READ = refusals(400, 401, 403, 404, 503)
_WRITE = refusals(400, 401, 403, 404, 408, 409, 413, 415, 429, 503)


def _body(schema: dict[str, Any], *, required: bool) -> dict[str, Any]:
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


def _listed(texts: list[str]) -> list[str]:
    """Return what was given several times, or once with commas."""
    return [part for text in texts for part in text.split(",") if part]


@router.get("/options", response_model=Options, responses=_READ)
async def options(plane: Plane) -> Response:
    """Return what may be chosen in a submission, with types, ranges, defaults and help."""
    return JsonResponse(await plane.ask(plane.options))


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobBody | SweepBody,
    responses=_WRITE,
    openapi_extra=_body({"$ref": "#/components/schemas/Submission"}, required=True),
)
async def submit(
    request: Request,
    plane: Plane,
    asker: Asker,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=128,
            description="the same submission with the same key again returns what is there",
        ),
    ] = None,
) -> Response:
    """Submit a job, or with `sweep` one for each combination of its values."""
    submission = await read_object(request)
    answer = await plane.ask(plane.submit, submission, asker, idempotency_key)
    return JsonResponse(answer, 201)


@router.get("/jobs", response_model=JobPage, responses=_READ)
async def list_jobs(
    plane: Plane,
    asker: Asker,
    state: Annotated[
        list[str], Query(description=f"any of {', '.join(State)}; several, or with commas")
    ] = [],  # noqa: B006 -- FastAPI copies it
    name: str | None = None,
    sweep: str | None = None,
    text: Annotated[str | None, Query(max_length=200)] = None,
    owner: str | None = None,
    archived: bool = False,
    cursor: Annotated[str | None, Query(description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Response:
    """Return jobs, newest first, and how many there are in each state."""
    states = _listed(state)
    if unknown := sorted(set(states) - set(State)):
        raise InvalidRequestError(f"state={unknown[0][:40]}: must be one of {', '.join(State)}")
    selection = Selection([State(each) for each in states], name, sweep, text, owner, archived)
    return JsonResponse(await plane.ask(plane.select, selection, asker, cursor=cursor, limit=limit))


@router.get("/jobs/compare", response_model=Comparison, responses=_READ)
async def compare(
    plane: Plane,
    ids: Annotated[list[str], Query(description="of jobs; several, or with commas")],
    by: Annotated[
        list[str] | None,
        Query(description="keys that make a group; without, all that differ but the seed"),
    ] = None,
) -> Response:
    """Return jobs side by side: metrics, the keys that differ, and means over seeds."""
    keys = None if by is None else _listed(by)
    return JsonResponse(await plane.ask(plane.compare, _listed(ids), keys))


@router.get("/jobs/{id}", response_model=JobDetail, responses=_READ)
async def job(plane: Plane, asker: Asker, id: str) -> Response:
    """Return all that is known of a job."""
    return JsonResponse(await plane.ask(plane.detail, id, asker))


@router.get(
    "/jobs/{id}/log",
    response_class=Response,
    responses=_READ
    | {
        200: {
            "description": "a part of the log",
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "headers": {
                LOG_OFFSET: {"description": "of the next part", "schema": {"type": "integer"}},
                LOG_SIZE: {"description": "of the log so far", "schema": {"type": "integer"}},
            },
        }
    },
)
async def log(
    plane: Plane,
    id: str,
    offset: Annotated[
        int, Query(ge=-(2**62), le=2**62, description="of the first byte; negative: from the end")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_PIECE_BYTES, description="bytes")] = 1 << 16,
    attempt: Annotated[
        int | None, Query(ge=1, description="only of this one, as if it were all")
    ] = None,
) -> Response:
    """Return what the processes of a job printed, in all of its attempts."""
    piece = await plane.ask(plane.log, id, offset, limit, attempt)
    headers = {LOG_OFFSET: str(piece.end), LOG_SIZE: str(piece.size_bytes)}
    return Response(piece.text, media_type="text/plain; charset=utf-8", headers=headers)


@router.get(
    "/jobs/{id}/metrics",
    response_model=Measurements,
    responses=_READ | {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def metrics(
    plane: Plane,
    id: str,
    kind: Literal["epochs", "steps"] = "epochs",
    format: Literal["json", "csv"] = "json",
    after: Annotated[float | None, Query(description="only lines of later steps")] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_LINES, description="lines; of more, evenly spread ones")
    ] = 10_000,
) -> Response:
    """Return what was measured at each epoch, or every few steps."""
    lines = await plane.ask(plane.measurements, id, kind, limit, after)
    if format == "csv":
        file = f'attachment; filename="{id}-{kind}.csv"'
        text = await plane.ask(to_csv, lines)
        return Response(
            text, media_type="text/csv; charset=utf-8", headers={"Content-Disposition": file}
        )
    return JsonResponse({"metrics": lines})


@router.get(
    "/jobs/{id}/curves.png",
    response_class=Response,
    responses=_READ
    | {
        200: {
            "description": "loss, metric and learning rate over the epochs",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def curves(plane: Plane, id: str) -> Response:
    """Return a picture of a job's curves as they are so far."""
    found = await plane.ask(plane.get, id)
    workspace = await plane.ask(plane.workspace, id)
    picture = await plane.curves.draw(workspace.run.path, f"{found.name} ({found.id})")
    return Response(picture, media_type="image/png")


@router.post(
    "/jobs/{id}/{action}",
    status_code=202,
    response_model=JobBody,
    responses=_WRITE,
    openapi_extra=_body(
        {
            "type": "object",
            "properties": {
                "values": {"type": "object", "description": "of resume: such as more epochs"},
                "model": {"type": "string", "description": "of publish: the model's name"},
            },
        },
        required=False,
    ),
)
async def act(request: Request, plane: Plane, asker: Asker, id: str, action: Action) -> Response:
    """Ask for something to be done with a job; its events tell when it is.

    cancel and pause have it write its state and stop; resume and retry go on from there, resume
    also after the end with more epochs; publish copies its model to those that are served; archive
    puts it away.
    """
    arguments = await read_object(request)
    return JsonResponse(await plane.ask(plane.act, id, action, asker, arguments), 202)
