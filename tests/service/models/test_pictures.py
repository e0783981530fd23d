import io

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidRequestError
from service.models.pictures import default_palette, mask_picture


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 9, 23, 24, 150, 256, 1000])
def test_every_class_has_a_color_of_its_own(classes: int) -> None:
    palette = default_palette(classes)
    assert len(set(palette)) == classes
    assert all(0 <= shade <= 255 for color in palette for shade in color)
    # Classes keep their colors when others are added.
    assert palette == default_palette(1000)[:classes]


def test_first_colors_are_those_of_okabe_and_ito() -> None:
    written = ["#" + bytes(color).hex() for color in default_palette(8)]
    assert written == [
        *("#000000", "#e69f00", "#56b4e9", "#009e73"),
        *("#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
    ]


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 17, 256])
def test_pixels_of_a_picture_are_indices_whatever_the_number_of_classes(classes: int) -> None:
    mask = np.random.default_rng(0).integers(0, classes, (7, 11), np.int32)
    palette = default_palette(classes)
    with Image.open(io.BytesIO(mask_picture(mask, palette))) as picture:
        assert (picture.mode, picture.size) == ("P", (11, 7))
        np.testing.assert_array_equal(np.asarray(picture), mask)
        colored = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(colored, np.array(palette, np.uint8)[mask])


def test_picture_has_room_for_256_classes() -> None:
    with pytest.raises(
        InvalidRequestError, match="has room for 256 classes, and the model has 257"
    ):
        mask_picture(np.zeros((2, 2), np.int32), default_palette(257))
