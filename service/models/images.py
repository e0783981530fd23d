"""Image files as samples of a model."""

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from syncbn import images
from syncbn.bundle import Manifest
from syncbn.errors import ImageError


def read_image(
    content: bytes, manifest: Manifest, *, max_pixels: int, name: str = "image"
) -> NDArray[np.float32]:
    """Return an image file as a raw sample, as a client that sends tensors would send it.

    The pixels are those by which training's data sets of image files evaluate, since both read them
    by `syncbn.images.read_image`. A pixel of p becomes p/(255·scale), so that preprocessing, which
    multiplies by `scale`, sees 0 to 1.

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
    if len(shape) != 3 or shape[0] not in images.MODES:
        raise InvalidRequestError(
            f"model {manifest.name!r} takes no images, but inputs of shape {list(shape)}; "
            f"send tensors to /v2/models/{manifest.name}/infer"
        )
    channels, height, width = shape
    try:
        pixels = images.read_image(content, (channels, height, width), max_pixels=max_pixels)
    except ImageError as error:
        raise InvalidRequestError(f"{name[:80]!r} {error}") from None
    scale = manifest.preprocessing.scale or 1.0
    with np.errstate(over="ignore"):  # of a scale next to 0, with which no input is finite
        return np.asarray(pixels.astype(np.float64) / (255 * scale), np.float32)
