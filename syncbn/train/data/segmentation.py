"""Data sets of images with masks."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from syncbn.bundle import InputSpec
from syncbn.train.data.dataset import IMAGENET, Dataset, image_input, standardizing
from syncbn.train.data.images import TensorImages, load_digits
from syncbn.train.data.layouts import (
    Layout,
    cityscapes_layout,
    masks_layout,
    pets_layout,
    voc_layout,
    voc_palette,
)
from syncbn.train.data.masks import FilePairs, Form, MaskedImages, StoredPairs
from syncbn.train.data.scenes import CLASSES, draw_scenes
from syncbn.train.data.splits import Part, hold_out
from syncbn.train.schema import (
    CityscapesConfig,
    DataConfig,
    DigitScenesConfig,
    MaskFilesConfig,
    MasksConfig,
    VocConfig,
)


def masked_files(config: DataConfig, seed: int, moves: Callable[[], None]) -> Dataset:
    """Return a data set of files of images and masks, in the layout that is configured."""
    assert isinstance(config, MaskFilesConfig)
    path = Path(config.path)
    layout: Layout
    match config:
        case MasksConfig():
            layout = masks_layout(path, moves)
        case VocConfig():
            layout = voc_layout(path)
        case CityscapesConfig():
            layout = cityscapes_layout(path)
        case _:
            layout = pets_layout(path)
    form = Form(3, config.height, config.width, config.scale_min, config.scale_max, config.flip)
    splits = {
        name: MaskedImages(
            FilePairs(files, layout.values, str(path)), form, seed if name == "train" else None
        )
        for name, files in layout.splits.items()
    }
    return Dataset(
        train=splits["train"],
        test=splits.get("test"),
        classes=layout.classes,
        input=InputSpec(name="image", shape=(3, config.height, config.width), dtype="float32"),
        preprocessing=IMAGENET,
        validation=splits.get("validation"),
        palette=layout.palette,
    )


def digit_scenes(config: DataConfig, seed: int, moves: Callable[[], None]) -> Dataset:
    """Return scenes of digits, of which no two splits have a digit in common.

    The digits are split as `digits()` splits them; scenes to validate take digits from training.
    """
    assert isinstance(config, DigitScenesConfig)
    train, test = load_digits()
    digits, held_out = hold_out(train, config.validation, seed)
    validating = 0 if held_out is None else max(1, round(config.validation * config.samples))
    form = Form(3, config.size, config.size, config.scale_min, config.scale_max, config.flip)

    def scenes(source: TensorImages, which: Tensor | None, count: int, draw: int) -> StoredPairs:
        chosen = slice(None) if which is None else which
        moves()
        return draw_scenes(source.samples[chosen], source.labels[chosen], count, config.size, draw)

    learned = scenes(
        train,
        digits.indices if isinstance(digits, Part) else None,
        max(1, config.samples - validating),
        0,
    )
    validation = None
    if held_out is not None:
        pairs = scenes(train, held_out.indices, validating, 1)
        validation = MaskedImages(pairs, form, None)
    return Dataset(
        train=MaskedImages(learned, form, seed),
        test=MaskedImages(scenes(test, None, config.test_samples, 2), form, None),
        classes=CLASSES,
        input=image_input(learned.images),
        preprocessing=standardizing(learned.images),
        validation=validation,
        palette=voc_palette(len(CLASSES)),
    )
