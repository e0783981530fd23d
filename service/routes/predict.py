"""Images in, classes out: what people use, while programs send tensors."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.errors import BodyTimeoutError, InvalidRequestError
from service.inference import DataPlane
from service.routes.answers import JsonResponse, PlainRoute, path_parameters
from service.routes.body import has_left, read_body
from service.routes.inference import REFUSALS
from service.schemas import Predictions

router = APIRouter(tags=["predict"], route_class=PlainRoute)
_FIELD = "files"
_PATH = "/predict/{name}"
_FILE = {"type": "string", "format": "binary"}


def _description(*path: str) -> dict[str, Any]:
    form = {"type": "object", "required": [_FIELD]} | {
        "properties": {_FIELD: {"type": "array", "items": _FILE, "minItems": 1}}
    }
    images = {f"image/{kind}": {"schema": _FILE} for kind in ("png", "jpeg", "webp")}
    return {
        "parameters": path_parameters(*path),
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, **images},
        },
    }


@router.post(
    _PATH + "/versions/{version}",
    response_model=Predictions,
    responses=REFUSALS,
    openapi_extra=_description("name", "version"),
)
@router.post(
    _PATH, response_model=Predictions, responses=REFUSALS, openapi_extra=_description("name")
)
async def predict(request: Request) -> Response:
    """Return the class of each image in the form field `files`, or of the one that is the body.

    PNG, JPEG and WebP are read, made as large as the model's input, and preprocessed as it was
    trained.
    """
    settings = request.app.state.settings
    data_plane: DataPlane = request.app.state.data_plane
    name, version = request.path_params["name"], request.path_params.get("version")
    data_plane.registry.get(name, version)  # an unknown model costs no body
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        files = await _form_files(request, settings.max_request_rows, settings.timeout_s)
    elif content_type.startswith("image/"):
        limit_bytes, timeout_s = settings.max_body_bytes, settings.timeout_s
        body = await read_body(request, limit_bytes=limit_bytes, timeout_s=timeout_s)
        files = [("the image", body)]
    else:
        raise InvalidRequestError(
            f"send image files as multipart/form-data in the field {_FIELD!r}, or one as the body "
            f"with its type, say image/png; got Content-Type {content_type[:80]!r}"
        )
    receive = request.receive
    answer = await data_plane.classify(name, version, files, lambda: has_left(receive))
    return JsonResponse(answer.model_dump())


async def _form_files(
    request: Request, max_files: int, timeout_s: float
) -> list[tuple[str, bytes]]:
    """Return the name and content of each file of a form."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            request.form(max_files=max_files, max_fields=16) as form,
        ):
            files = form.getlist(_FIELD)
            if not files or not all(isinstance(file, UploadFile) for file in files):
                raise InvalidRequestError(
                    f"the form has no files in the field {_FIELD!r}; "
                    f"its fields are {sorted(set(form))[:8]}"
                )
            return [
                (file.filename or f"file {number}", await file.read())
                for number, file in enumerate(files, 1)
                if isinstance(file, UploadFile)
            ]
    except TimeoutError:
        raise BodyTimeoutError(f"the body took longer than {timeout_s:g} s") from None
    except ClientDisconnect:
        raise BodyTimeoutError("the client went away before the end of the body") from None
    except HTTPException as error:  # of the form's own parser
        raise InvalidRequestError(f"the form cannot be read: {error.detail}") from None
