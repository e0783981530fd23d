"""The pages for people: predictions at /, training at /jobs, the API's description at /docs."""

from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.responses import RedirectResponse

router = APIRouter(include_in_schema=False)

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _Asset:
    body: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        # A browser keeps the file and asks each time whether it is still the same, so that it
        # never mixes those of two versions of the service.
        headers = {"ETag": self.etag, "Cache-Control": "no-cache"}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def _load(file: Traversable) -> _Asset:
    body = file.read_bytes()
    return _Asset(body, _TYPES[file.name.rsplit(".")[-1]], f'"{sha256(body).hexdigest()[:32]}"')


_own = files("service") / "static"
_swagger = files("fastapi_swagger") / "resources"  # swagger-ui-dist as released, unchanged
_uplot = _own / "vendor" / "uplot"  # as released, unchanged; its license stands beside it
_PAGE, _JOBS, _DOCS = (_load(_own / name) for name in ("page.html", "jobs.html", "docs.html"))
_MODULES = (
    "answers",
    "docs",
    "elements",
    "events",
    "jobs",
    "jobs-actions",
    "jobs-charts",
    "jobs-compare",
    "jobs-curves",
    "jobs-field",
    "jobs-form",
    "jobs-job",
    "jobs-list",
    "jobs-log",
    "jobs-past",
    "jobs-words",
    "page",
    "requests",
)
# All that there is: a name that was asked for is looked up here, and never in a directory.
_STATIC = {
    file.name: _load(file)
    for file in (
        *(
            _own / f"{name}.css"
            for name in ("base", "docs", "jobs", "jobs-form", "jobs-job", "page")
        ),
        *(_own / f"{name}.js" for name in _MODULES),
        _own / "icon.svg",
        _uplot / "uPlot.iife.min.js",
        _uplot / "uPlot.min.css",
        _swagger / "swagger-ui.css",
        _swagger / "swagger-ui-bundle.js",
    )
}


@router.get("/")
async def page(request: Request) -> Response:
    """Return the page that lists the models and predicts images."""
    return _PAGE.answer(request)


@router.get("/jobs")
async def jobs(request: Request) -> Response:
    """Return the page that submits, shows and compares jobs; what it shows stands behind the #."""
    return _JOBS.answer(request)


@router.get("/jobs/{id}")
async def job(id: str) -> Response:
    """Lead to a job on the page of jobs."""
    if not (id.isascii() and id.isalnum()):
        raise HTTPException(404)
    return RedirectResponse(f"../jobs#{id}")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the page that shows /openapi.json, without asking any other server for anything."""
    return _DOCS.answer(request)


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Return a file that one of the pages needs."""
    asset = _STATIC.get(name)
    if asset is None:
        raise HTTPException(404)
    return asset.answer(request)
