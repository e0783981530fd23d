"""Images in, classes out: what people use, while programs send tensors."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.errors import BodyTimeoutError, InvalidRequestError
from service.models.data_plane import DataPlane
from service.routes.inference import REFUSALS
from service.routes.requests import has_left, read_body
from service.routes.responses import JsonResponse, PlainRoute, path_parameters
from service.schemas import Predictions, Segmentations, TensorPredictions

router = APIRouter(tags=["predict"], route_class=PlainRoute)
_FIELD = "files"
_PATH = "/predict/{name}"
_PICTURE = "image/png"
_FILE = {"type": "string", "format": "binary"}


def _description(*path: str) -> dict[str, Any]:
    form = {"type": "object", "required": [_FIELD]} | {
        "properties": {_FIELD: {"type": "array", "items": _FILE, "minItems": 1}}
    }
    images = {f"image/{kind}": {"schema": _FILE} for kind in ("png", "jpeg", "webp")}
    mask = "png: a segmentation's answer holds its mask as a PNG file in Base64"
    return {
        "parameters": [
            *path_parameters(*path),
            {"name": "mask", "in": "query", "required": False, "description": mask}
            | {"schema": {"type": "string", "enum": ["png"]}},
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, **images},
        },
        "responses": {
            "200": {
                "description": "what the model makes of each image; with Accept: image/png, the "
                "mask of a segmentation as a picture",
                "content": {"image/png": {"schema": _FILE}},
            }
        },
    }


@router.post(
    _PATH + "/versions/{version}",
    response_model=Predictions | Segmentations | TensorPredictions,
    responses=REFUSALS,
    openapi_extra=_description("name", "version"),
)
@router.post(
    _PATH,
    response_model=Predictions | Segmentations | TensorPredictions,
    responses=REFUSALS,
    openapi_extra=_description("name"),
)
async def predict(request: Request) -> Response:
    """Return what a model makes of each image in the form field `files`, or of the body's one.

    PNG, JPEG and WebP are read, made as large as the model's input, and preprocessed as it was
    trained. A classification answers classes, a segmentation the share of pixels of each class;
    of one image, it answers Accept: image/png with the mask as a picture.
    """
    settings = request.app.state.settings
    data_plane: DataPlane = request.app.state.data_plane
    name, version = request.path_params["name"], request.path_params.get("version")
    model = data_plane.registry.get(name, version)  # an unknown model costs no body
    mask = request.query_params.get("mask")
    if mask not in (None, "png"):
        raise InvalidRequestError(f"the parameter mask must be png, got {mask[:40]!r}")
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
    if model.manifest.task == "segmentation" and _wants_picture(request):
        if len(files) != 1:
            raise InvalidRequestError(
                f"{len(files)} image files, but a picture answers one; send one at a time, or "
                "accept application/json"
            )
        picture = await data_plane.paint(name, version, files[0], lambda: has_left(receive))
        return Response(picture, media_type=_PICTURE, headers={"Vary": "Accept"})
    answer = await data_plane.recognize(
        name, version, files, lambda: has_left(receive), with_mask=mask is not None
    )
    return JsonResponse(answer.model_dump())


def _wants_picture(request: Request) -> bool:
    """Return whether a request names PNG among what it accepts, and JSON not."""
    accepted = [
        kind.partition(";")[0].strip().lower()
        for kind in request.headers.get("accept", "").split(",")
    ]
    return _PICTURE in accepted and "application/json" not in accepted


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
