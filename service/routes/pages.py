"""The pages for people: models and predictions at /, the API's description at /docs."""

from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, HTTPException, Request, Response

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
_PAGE, _DOCS = (_load(_own / name) for name in ("page.html", "docs.html"))
# All that there is: a name that was asked for is looked up here, and never in a directory.
_STATIC = {
    file.name: _load(file)
    for file in (
        _own / "page.css",
        _own / "page.js",
        _own / "answers.js",
        _own / "elements.js",
        _own / "docs.css",
        _own / "docs.js",
        _own / "icon.svg",
        _swagger / "swagger-ui.css",
        _swagger / "swagger-ui-bundle.js",
    )
}


@router.get("/")
async def page(request: Request) -> Response:
    """Return the page that lists the models and predicts images."""
    return _PAGE.answer(request)


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
