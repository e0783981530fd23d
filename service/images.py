"""Image files as samples of a model."""

import contextlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import InvalidRequestError
from syncbn.bundle import Manifest

# By how files begin.
_FORMATS = {b"\x89PNG": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"RIFF": WebPImageFile}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_image(
    content: bytes, manifest: Manifest, *, max_pixels: int, name: str = "image"
) -> NDArray[np.float32]:
    """Return an image file as a raw sample, as a client that sends tensors would send it.

    The image is turned as its EXIF orientation says, made grey or coloured as the model's input is
    (what was transparent is shown as it is stored), and cut to a square in its middle, or whatever
    the input's proportions are, which is resized with antialiasing: as training's data set
    `folder` evaluates (`syncbn.train.data.images.FolderImages`), up to one step of 255 by rounding.
    So JPEG files are decoded whole, though a fraction of the size would take an eighth of the time:
    it is off by up to ten steps. One of exactly the input's size is not resized. An orientation
    that cannot be read is none. A pixel of p becomes
    p/(255·scale), so that preprocessing, which multiplies by `scale`, sees 0 to 1.

    Args:
        content: a PNG, JPEG or WebP file; of an animation, its first image.
        manifest: of the model, whose input must be (channels, height, width) with 1, 3 or 4
            channels.
        max_pixels: of the image, which is told before it is decoded.
        name: of the file, for messages.

    Returns:
        Shape `manifest.input.shape`, float32.

    Raises:
        InvalidRequestError: it is no such file, or broken, or too large, or has more than 8 bits a
            channel, or the model takes no images.
    """
    shape = manifest.input.shape
    name = name[:80]
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InvalidRequestError(
            f"model {manifest.name!r} takes no images, but inputs of shape {list(shape)}; "
            f"send tensors to /v2/models/{manifest.name}/infer"
        )
    channels, height, width = shape
    try:
        with _opened(content) as image:
            if image.width * image.height > max_pixels:
                raise InvalidRequestError(
                    f"{name!r} has {image.width}×{image.height} pixels; send at most {max_pixels}"
                )
            if image.mode.startswith(("I", "F")):
                raise InvalidRequestError(
                    f"{name!r} has more than 8 bits a channel (Pillow's mode {image.mode}), which "
                    "would become white; store it with 8 bits"
                )
            image.load()
            with contextlib.suppress(Exception):  # of a broken EXIF part, as viewers do
                ImageOps.exif_transpose(image, in_place=True)
            if channels != 4:
                # Pillow would warn of a palette's transparency that gets lost.
                image.info.pop("transparency", None)
            fitted = _fitted(image.convert(_MODES[channels]), width, height)
    except InvalidRequestError:
        raise
    except Image.DecompressionBombError:  # its WebP reader has a limit of its own
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise InvalidRequestError(
            f"{name!r} has more than {most} pixels; send at most {most}"
        ) from None
    except Exception as error:  # decoders raise much more than OSError
        # Pillow's own words for a file of another kind tell where it lies in memory.
        why = "" if isinstance(error, UnidentifiedImageError) else f": {str(error)[:200]}"
        raise InvalidRequestError(
            f"{name!r} cannot be read as a PNG, JPEG or WebP image{why}"
        ) from None
    pixels = np.asarray(fitted, np.float64).reshape(height, width, channels).transpose(2, 0, 1)
    scale = manifest.preprocessing.scale or 1.0
    with np.errstate(over="ignore"):  # of a scale next to 0, with which no input is finite
        return np.ascontiguousarray(pixels / (255 * scale), np.float32)


def _opened(content: bytes) -> ImageFile.ImageFile:
    """Return an image of which only the header was read.

    `Image.open` would warn of large images, or refuse them, before they can be asked their size,
    and nothing silences a warning in one thread alone.
    """
    for start, reader in _FORMATS.items():
        if content.startswith(start):
            return reader(io.BytesIO(content))
    raise UnidentifiedImageError


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the middle of an image with the proportions of a size, in that size."""
    if image.size == (width, height):
        return image
    share = min(image.width / width, image.height / height)
    part = (max(1, round(share * width)), max(1, round(share * height)))
    left, top = (round((all_ - some) / 2) for all_, some in zip(image.size, part, strict=True))
    box = (left, top, left + part[0], top + part[1])
    # Cuts without the warnings that Image.crop has of large images, as in `_opened`. First, since
    # what is outside would take part in resizing.
    middle = image.transform(part, Image.Transform.EXTENT, box)
    # Of Pillow's filters, the one that torchvision resizes with.
    return middle.resize((width, height), Image.Resampling.BILINEAR)
