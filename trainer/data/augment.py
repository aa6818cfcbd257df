"""Random changes to a picture: colours, and crops around a face. Drawn as plain values, applied later.

The chances and ranges are those of kohya-ss/sd-scripts, `library/train_util.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from trainer.data.buckets import Size
from trainer.data.resizing import Pixels

_COLOUR_CHANCE = 0.33
_MAX_HUE_DEGREES = 16.0
_GAMMAS = (0.95, 1.05)

_SHAKEN_FACE_PIXELS = 40
"""Smaller faces keep their place: moved by a twentieth of themselves they would not be seen to move."""


@dataclass(frozen=True)
class ColourChange:
    """A turn of all hues by `amount` degrees, or `amount` as the exponent of all values from 0 to 255.

    An exponent there, not on values from 0 to 1, changes brightness by up to a third; so it is in the reference.
    """

    kind: Literal["hue", "gamma"]
    amount: float


def draw_colour(rng: random.Random) -> ColourChange | None:
    """A change in one of three draws, hue and gamma equally often."""
    if rng.random() > _COLOUR_CHANCE:
        return None
    if rng.random() > 0.5:
        return ColourChange("hue", rng.uniform(-_MAX_HUE_DEGREES, _MAX_HUE_DEGREES))
    return ColourChange("gamma", rng.uniform(*_GAMMAS))


def change_colour(pixels: Pixels, change: ColourChange) -> Pixels:
    """(height, width, 3) with other colours."""
    if change.kind == "gamma":
        table = np.clip(np.arange(256, dtype=np.float64) ** change.amount, 0, 255).astype(np.uint8)
        return table[pixels]
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    turn = round(change.amount * 256 / 360)
    hsv[..., 0] = ((hsv[..., 0].astype(np.int64) + turn) % 256).astype(np.uint8)
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"), dtype=np.uint8)


@dataclass(frozen=True)
class Face:
    """Centre and size of a face, in pixels of the file."""

    centre: Size
    size: Size


def face_of(path: Path) -> Face | None:
    """The face that a name ending in `_x_y_width_height` tells of, as face detection tools write it."""
    parts = path.stem.split("_")
    if len(parts) < 5 or not all(part.isascii() and part.isdigit() for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    return Face((x, y), (width, height)) if x > 0 and max(width, height) > 0 else None


def draw_face_crop(
    size: Size, face: Face, bucket: Size, sizes: tuple[float, float], rng: random.Random, *, is_random: bool
) -> tuple[Size, Size]:
    """(resized, crop): the picture's new size and the left top corner of `bucket` in it, with the face in the middle.

    The short side of the crop is `sizes` times the long side of the face, drawn between the two as far as the picture
    is large enough; it is never enlarged unless the bucket demands it. `is_random` moves the face out of the middle, near
    places more likely than far ones; otherwise it moves by at most a twentieth of itself, and not at all when both
    `sizes` are equal.
    """
    if size == bucket:
        return size, (0, 0)
    longest, short_side = max(face.size), min(bucket)
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    smallest = max(cover, min(1.0, short_side / (longest * sizes[1])))
    largest = max(smallest, min(1.0, short_side / (longest * sizes[0])))
    scale = rng.uniform(smallest, largest) if smallest < largest else smallest
    resized = (max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))
    corner: list[int] = []
    # Height first, the reference's order of draws.
    for axis in (1, 0):
        middle = int(face.centre[axis] * scale + 0.5)
        start = middle - bucket[axis] // 2
        if is_random:
            reach = max(resized[axis] - middle, middle)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif sizes[0] != sizes[1] and longest > short_side // 10 and longest >= _SHAKEN_FACE_PIXELS:
            start += rng.randint(-(longest // 20), longest // 20)
        corner.insert(0, max(0, min(start, resized[axis] - bucket[axis])))
    return resized, (corner[0], corner[1])
