"""Image files as samples: decoded, turned upright, cut and resized, for training and for serving.

Both use these functions, so that a model is served what it was evaluated on, to the bit.
"""

import contextlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from syncbn.errors import ImageError

# By how files begin.
_FORMATS = {b"\x89PNG": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"RIFF": WebPImageFile}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_image(
    content: bytes, shape: tuple[int, int, int], *, max_pixels: int, any_format: bool = False
) -> NDArray[np.uint8]:
    """Return an image file in the shape of a sample, as training evaluates and serving predicts.

    It is decoded by `decode_image`, and brought to its size by `fit_image`.

    Args:
        content: the file.
        shape: (channels, height, width), with 1, 3 or 4 channels.
        max_pixels: of the image, which is told before it is decoded.
        any_format: whether to read whatever Pillow does, and not PNG, JPEG and WebP alone.

    Returns:
        Shape `shape`, uint8.

    Raises:
        ImageError: see `decode_image`.
    """
    channels, height, width = shape
    image = decode_image(content, channels, max_pixels=max_pixels, any_format=any_format)
    return image_array(fit_image(image, width, height))


def decode_image(
    content: bytes, channels: int, *, max_pixels: int, any_format: bool = False
) -> Image.Image:
    """Return an image file, whole, upright, and grey or colored as its channels say.

    The image is turned as its EXIF orientation says; one that cannot be read is none. What was
    transparent is shown as it is stored. JPEG files are decoded whole, though a fraction of the
    size would take an eighth of the time: it is off by up to ten steps of 255.

    Args:
        content: the file; of an animation, its first image.
        channels: 1, 3 or 4.
        max_pixels: of the image, which is told before it is decoded.
        any_format: whether to read whatever Pillow does, and not PNG, JPEG and WebP alone.

    Raises:
        ImageError: it is no such file, or broken, or too large, or has more than 8 bits a channel.
            The message goes on after the file's name.
    """
    try:
        with _opened(content, any_format) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"has {image.width}×{image.height} pixels; at most {max_pixels} are read"
                )
            if image.mode.startswith(("I", "F")):
                raise ImageError(
                    f"has more than 8 bits a channel (Pillow's mode {image.mode}), which would "
                    "become white; store it with 8 bits"
                )
            image.load()
            with contextlib.suppress(Exception):  # of a broken EXIF part, as viewers do
                ImageOps.exif_transpose(image, in_place=True)
            if channels != 4:
                # Pillow would warn of a palette's transparency that gets lost.
                image.info.pop("transparency", None)
            return image.convert(MODES[channels])
    except ImageError:
        raise
    except Image.DecompressionBombError:  # its WebP reader has a limit of its own
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageError(f"has more than {most} pixels; at most {most} are read") from None
    except Exception as error:  # decoders raise much more than OSError
        # Pillow's own words for a file of another kind tell where it lies in memory.
        why = "" if isinstance(error, UnidentifiedImageError) else f": {str(error)[:200]}"
        kind = "an image" if any_format else "a PNG, JPEG or WebP image"
        raise ImageError(f"cannot be read as {kind}{why}") from None


def fit_image(image: Image.Image, width: int, height: int, *, is_mask: bool = False) -> Image.Image:
    """Return the middle of an image with the proportions of a size, in that size.

    The middle is resized with antialiasing; one that has the size already is not.

    Args:
        image: of any size.
        width: in pixels.
        height: in pixels.
        is_mask: whether pixels are numbers of classes, of which the nearest is taken.
    """
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
    how = Image.Resampling.NEAREST if is_mask else Image.Resampling.BILINEAR
    return middle.resize((width, height), how)


def image_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an image with 8 bits a channel, shape (channels, height, width)."""
    pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, -1)
    return pixels.transpose(2, 0, 1).copy()


def _opened(content: bytes, any_format: bool) -> ImageFile.ImageFile:
    """Return an image of which only the header was read.

    `Image.open` would warn of large images, or refuse them, before they can be asked their size,
    and nothing silences a warning in one thread alone.
    """
    for start, reader in _FORMATS.items():
        if content.startswith(start):
            return reader(io.BytesIO(content))
    if any_format:
        return Image.open(io.BytesIO(content))
    raise UnidentifiedImageError
