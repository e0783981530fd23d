"""Images with masks of their pixels' classes, and random changes that keep both in place."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from syncbn.errors import ConfigError, ImageError
from syncbn.train.data.checks import IGNORED
from syncbn.train.data.files import MAX_PIXELS, read_file, readable, relative_sizes
from syncbn.train.data.images import random_words
from syncbn.train.data.sampling import Batch, Key

if TYPE_CHECKING:
    from PIL.Image import Image

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Form:
    """What images with masks are brought to, and how training changes them.

    Attributes:
        channels: 1 or 3.
        height: in pixels.
        width: in pixels.
        scale_min: training sees images this much larger than evaluation, at least.
        scale_max: at most; the logarithm of the scale is uniform.
        flip: whether every other image is mirrored, at random.
    """

    channels: int
    height: int
    width: int
    scale_min: float = 1.0
    scale_max: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        """Raise a ConfigError if no scale is between the two."""
        if self.scale_min > self.scale_max:
            raise ConfigError(
                f"data.scale_min={self.scale_min:g} is above data.scale_max={self.scale_max:g}; "
                "scales are drawn between them"
            )


class Pairs(Protocol):
    """Images and masks, in whatever store."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, index: int) -> tuple["Image", "Image"]:
        """Return an image, and the numbers of its pixels' classes (255: none) as a grey image."""
        ...

    def part(self, indices: Sequence[int]) -> "Pairs":
        """Return some of them."""
        ...

    def files(self) -> list[Any]:
        """Return the names and sizes of files, for each pair; nothing if there are none."""
        ...


class MaskedImages:
    """Images whose targets are masks, both changed by seed, epoch and index alone.

    Without random changes, an image is what a service makes of its file (`syncbn.images`), and its
    mask is cut and resized likewise, by the nearest pixel. For training, both are scaled so that
    they would fill the form, and by a random factor; a random part of the form's size is cut out.
    What lies outside is black in the image, and 255 in the mask.

    Args:
        pairs: where they come from.
        form: what they are brought to.
        seed: decides the changes; None: there are none.
    """

    def __init__(self, pairs: Pairs, form: Form, seed: int | None) -> None:
        self._pairs = pairs
        self._form = form
        self._seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return images, shape (n, C, H, W), uint8, and masks, shape (n, H, W), int64."""
        from syncbn.images import fit_image, image_array

        form = self._form
        images = torch.empty(len(keys), form.channels, form.height, form.width, dtype=torch.uint8)
        masks = torch.empty(len(keys), form.height, form.width, dtype=torch.int64)
        words = None if self._seed is None else random_words(self._seed, keys, 4)
        for number, (_, index) in enumerate(keys):
            image, mask = self._pairs.read(index)
            if words is None:
                image = fit_image(image, form.width, form.height)
                mask = fit_image(mask, form.width, form.height, is_mask=True)
            else:
                image, mask = _changed(image, mask, form, words[number])
            images[number] = torch.from_numpy(image_array(image))
            masks[number] = torch.from_numpy(image_array(mask)[0])
        return images, masks

    def plain(self) -> "MaskedImages":
        """Return the same images and masks without random changes."""
        return MaskedImages(self._pairs, self._form, None)

    def without_damaged(self, moves: Callable[[], None]) -> "MaskedImages":
        """Return those of which image and mask can be read; the others are logged.

        Args:
            moves: is called from time to time, so that nobody takes this for a hang.
        """
        good = readable(len(self), self._pairs.read, moves)
        return MaskedImages(self._pairs.part(good), self._form, self._seed)

    def files(self) -> list[Any]:
        """Return the names and sizes of files, for each pair; nothing if there are none."""
        return self._pairs.files()


class StoredPairs:
    """Images and masks in memory.

    Args:
        images: shape (N, C, H, W), uint8, with 1 or 3 channels.
        masks: shape (N, H, W), uint8.
    """

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self.images = images
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple["Image", "Image"]:
        """Return an image and its mask."""
        from PIL import Image

        pixels: _Bytes = self.images[index].permute(1, 2, 0).contiguous().numpy()
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return Image.fromarray(pixels), Image.fromarray(self.masks[index].numpy())

    def part(self, indices: Sequence[int]) -> "StoredPairs":
        """Return some of them."""
        return StoredPairs(self.images[list(indices)], self.masks[list(indices)])

    def files(self) -> list[Any]:
        """Return nothing."""
        return []


class FilePairs:
    """Images and masks in files, decoded when they are fetched.

    Args:
        files: for each pair, the image's and the mask's path.
        classes: for each of the 256 values that a mask's pixel may have, the number of its class,
            255 if it counts for nothing, or −1 if there must be none.
        root: the directory of the data set, for the names that `files` returns.
    """

    def __init__(self, files: Sequence[tuple[str, str]], classes: Sequence[int], root: str) -> None:
        self._files = files
        self._classes = np.array(classes, dtype=np.int16)
        self._root = root

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple["Image", "Image"]:
        """Return an image and its mask; raises a ConfigError that names the file at fault."""
        from PIL import Image

        from syncbn.images import decode_image

        image_file, mask_file = self._files[index]
        image = read_file(
            image_file,
            lambda content: decode_image(content, 3, max_pixels=MAX_PIXELS, any_format=True),
        )
        values = read_file(mask_file, read_mask)
        if values.shape != (image.height, image.width):
            raise ConfigError(
                f"the mask {mask_file} has {values.shape[1]}×{values.shape[0]} pixels; the image "
                f"{image_file} has {image.width}×{image.height}, turned as its EXIF orientation "
                "says; both must have the same"
            )
        mask = self._classes[values]
        if mask.min() < 0:
            wrong = int(values[mask < 0][0])
            raise ConfigError(
                f"the mask {mask_file} has the pixel value {wrong}, which is of no class; allowed "
                f"are {_ranges(np.flatnonzero(self._classes >= 0).tolist())}"
            )
        return image, Image.fromarray(mask.astype(np.uint8))

    def part(self, indices: Sequence[int]) -> "FilePairs":
        """Return some of them."""
        files = [self._files[index] for index in indices]
        return FilePairs(files, self._classes.tolist(), self._root)

    def files(self) -> list[Any]:
        """Return the names below the root and sizes of images and masks, for each pair."""
        images, masks = ([pair[which] for pair in self._files] for which in (0, 1))
        found = (relative_sizes(each, self._root) for each in (images, masks))
        return list(zip(*found, strict=True))


def read_mask(content: bytes) -> _Bytes:
    """Return the numbers that a file of a mask holds, shape (height, width), uint8.

    Raises:
        ImageError: it is no image with one number of up to 8 bits a pixel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            values = np.array(image).astype(np.uint8) if mode in ("1", "L", "P") else None
    except Exception as error:  # decoders raise much more than OSError
        raise ImageError(f"cannot be read as a mask: {str(error)[:200]}") from None
    if values is None:
        raise ImageError(
            f"has Pillow's mode {mode}; a mask must have one number a pixel, the class, as a "
            "grey or palette PNG with 8 bits"
        )
    return values


def _changed(
    image: "Image", mask: "Image", form: Form, words: "np.ndarray[Any, np.dtype[np.uint64]]"
) -> tuple["Image", "Image"]:
    """Return an image and its mask, scaled, cropped and mirrored together by four random words."""
    from PIL import Image

    share, right, down, mirror = (words >> np.uint64(11)) * 2.0**-53  # from 0 to below 1
    fill = max(form.height / image.height, form.width / image.width)
    scale = fill * form.scale_min * (form.scale_max / form.scale_min) ** share
    # For both axes: where the part begins in the scaled image and in the canvas, and its length.
    spans = [
        _span(max(1, round(length * scale)), wanted, place)
        for length, wanted, place in (
            (image.width, form.width, right),
            (image.height, form.height, down),
        )
    ]
    (left, at_x, width, across), (top, at_y, height, along) = spans
    x, y = image.width / across, image.height / along
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    changed: list[Image.Image] = []
    for each, how, outside in (
        (image, Image.Resampling.BILINEAR, 0),
        (mask, Image.Resampling.NEAREST, IGNORED),
    ):
        part = each.resize((width, height), how, box)
        if part.size != (form.width, form.height):
            canvas = Image.new(each.mode, (form.width, form.height), (outside,) * len(each.mode))
            canvas.paste(part, (at_x, at_y))
            part = canvas
        if form.flip and mirror < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        changed.append(part)
    return changed[0], changed[1]


def _span(scaled: int, wanted: int, place: float) -> tuple[int, int, int, int]:
    """Return where a part begins in the scaled image and the canvas, its length, and `scaled`."""
    free = int(place * (abs(scaled - wanted) + 1))
    return (free, 0, wanted, scaled) if scaled >= wanted else (0, free, scaled, scaled)


def _ranges(values: list[int]) -> str:
    """Return numbers for a message, with neighbors as a range."""
    parts: list[str] = []
    first = previous = values[0]
    for value in [*values[1:], 1 << 30]:
        if value != previous + 1:
            parts.append(str(first) if first == previous else f"{first} to {previous}")
            first = value
        previous = value
    return ", ".join(parts)
