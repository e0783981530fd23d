"""Masks as pictures for people: a color for each class."""

import colorsys
import io
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequestError
from syncbn.bundle import Manifest

Color = tuple[int, int, int]
MOST_CLASSES = 256  # that the palette of a PNG file has room for
# Chosen to be told apart with any color vision. Black comes first, as class 0 is the ground in
# most data sets, and dims what it lies on.
# Source: Okabe and Ito, "Color universal design" (2008).
_OKABE_ITO: tuple[Color, ...] = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_GOLDEN = 0.6180339887498949


def default_palette(classes: int) -> tuple[Color, ...]:
    """Return a different color for each of some classes.

    They are those of Okabe and Ito for the first eight, light ones of the same hues for the next
    eight, dark ones for seven more, and then hues that are a golden section apart.
    """
    white, black = (255, 255, 255), (0, 0, 0)
    colors = [
        *_OKABE_ITO,
        *(_mixed(color, white, 0.6) for color in _OKABE_ITO),
        *(_mixed(color, black, 0.5) for color in _OKABE_ITO[1:]),
    ]
    seen, step = set(colors), 0
    while len(colors) < classes:
        lightness = (0.35, 0.55, 0.75)[step % 3]
        shades = colorsys.hls_to_rgb(step * _GOLDEN % 1.0, lightness, 0.7)
        red, green, blue = (round(255 * shade) for shade in shades)
        if (red, green, blue) not in seen:
            seen.add((red, green, blue))
            colors.append((red, green, blue))
        step += 1
    return tuple(colors[:classes])


def _mixed(color: Color, other: Color, share: float) -> Color:
    """Return a color of which the other one makes up a share."""
    red, green, blue = (
        round(one + share * (two - one)) for one, two in zip(color, other, strict=True)
    )
    return red, green, blue


def palette_of(manifest: Manifest) -> tuple[Color, ...]:
    """Return the color of each class of a segmentation: the bundle's, or our own."""
    return manifest.palette or default_palette(len(manifest.classes))


def mask_picture(mask: NDArray[Any], palette: Sequence[Color]) -> bytes:
    """Return a mask as a PNG file in which each pixel is the index of its class.

    Args:
        mask: shape (height, width), integers from 0.
        palette: the color of each class.

    Raises:
        InvalidRequestError: there are more classes than a palette has room for.
    """
    if len(palette) > MOST_CLASSES:
        raise InvalidRequestError(
            f"a PNG picture has room for {MOST_CLASSES} classes, and the model has "
            f"{len(palette)}; ask for the output mask at /v2/models/…/infer"
        )
    height, width = mask.shape
    picture = Image.frombytes("P", (width, height), mask.astype("u1").tobytes())
    picture.putpalette(bytes(shade for color in palette for shade in color))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
