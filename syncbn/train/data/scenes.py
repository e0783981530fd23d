"""Scenes of several digits on a textured ground, with masks: segmentation without a download."""

from typing import Any

import numpy as np
import torch

from syncbn.train.data.masks import StoredPairs

_Array = np.ndarray[Any, np.dtype[Any]]

CLASSES = ("background", *(str(digit) for digit in range(10)))
# Of 16, from which on a pixel of a digit belongs to it.
_INK = 4


def draw_scenes(
    images: torch.Tensor, labels: torch.Tensor, count: int, size: int, seed: int
) -> StoredPairs:
    """Return scenes of two to four digits, each of another color and size, none over another.

    Args:
        images: of scikit-learn's digits, shape (N, 1, 8, 8), from 0 to 16.
        labels: shape (N,), int64.
        count: of scenes.
        size: height and width, in pixels.
        seed: decides everything that is random.

    Returns:
        Images of 3 channels; the digit d has the class d + 1.
    """
    chance = np.random.default_rng(np.random.SeedSequence((seed, count, size)))
    scenes = np.empty((count, size, size, 3), np.uint8)
    masks = np.zeros((count, size, size), np.uint8)
    ink = (images[:, 0].numpy() * 15.9).astype(np.uint8)
    for scene, mask in zip(scenes, masks, strict=True):
        scene[:] = _ground(chance, size)
        for which in chance.integers(0, len(ink), chance.integers(2, 5)):
            _place(chance, scene, mask, ink[which], int(labels[which]) + 1)
    return StoredPairs(
        torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(masks)
    )


def _ground(chance: np.random.Generator, size: int) -> _Array:
    """Return a dark texture: soft spots of some color, and grain."""
    from PIL import Image

    spots = Image.fromarray(chance.integers(0, 90, (5, 5, 3), dtype=np.uint8), "RGB")
    soft = np.asarray(spots.resize((size, size), Image.Resampling.BICUBIC), np.int16)
    return (soft + chance.integers(0, 40, (size, size, 3))).astype(np.uint8)


def _place(
    chance: np.random.Generator, scene: _Array, mask: _Array, ink: _Array, number: int
) -> None:
    """Paint a digit somewhere in a scene, if there is room for it."""
    from PIL import Image

    size = len(scene)
    side = min(size, int(chance.integers(13, 19)))
    large = np.asarray(Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC))
    color = chance.integers(140, 256, 3)
    for _ in range(10):
        top, left = chance.integers(0, size - side + 1, 2)
        place = np.s_[top : top + side, left : left + side]
        if mask[place].any():
            continue
        cover = large[..., None].astype(np.int32)
        scene[place] = (scene[place] * (255 - cover) + color * cover) // 255
        mask[place][large >= _INK * 16] = number
        return
