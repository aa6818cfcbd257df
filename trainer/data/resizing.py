"""Resizing of 8-bit pictures and masks, by the names of the reference trainer's `resize_interpolation`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.data.buckets import Size

_BAND_ROWS = 32
"""New rows that are averaged at once."""

_SMALLEST_SHARE = 1e-6
"""Less of a pixel than this is a rounding error."""

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}

Pixels = npt.NDArray[np.uint8]


def resize(image: Image.Image, size: Size, method: str | None) -> Pixels:
    """(height, width, 3) of `size`, or (height, width) of a grey `image`.

    `method` None averages areas when no side grows and is Lanczos otherwise. Area averaging is computed exactly, as
    OpenCV's INTER_AREA does, and is bilinear where a side grows. The reference takes bilinear and bicubic from OpenCV,
    which skips pixels when shrinking; Pillow's, used here, take all of them into account.
    """
    if image.size == size:
        return np.array(image, dtype=np.uint8)
    shrinks = size[0] <= image.size[0] and size[1] <= image.size[1]
    if method is None:
        method = "area" if shrinks else "lanczos"
    if method == "area":
        if shrinks:
            pixels = np.asarray(image, dtype=np.uint8)
            # The mean of many channels is the mean of each.
            return _average_areas(pixels.reshape(*pixels.shape[:2], -1), size).reshape(
                size[1], size[0], *pixels.shape[2:]
            )
        method = "bilinear"
    if method not in _FILTERS:
        raise ValueError(f"unknown way of resizing: {method}")
    return np.array(image.resize(size, _FILTERS[method]), dtype=np.uint8)


def _average_areas(pixels: Pixels, size: Size) -> Pixels:
    """Each new pixel is the mean of the area that it covers, parts of old pixels counted as parts."""
    width, height = size
    rows, columns = _taps(pixels.shape[0], height), _taps(pixels.shape[1], width)
    averaged = np.empty((height, width, pixels.shape[2]), dtype=np.uint8)
    # In bands that stay in the processor's cache.
    for top in range(0, height, _BAND_ROWS):
        band = slice(top, top + _BAND_ROWS)
        narrow = functools.reduce(np.add, (pixels[tap.positions[band]] * tap.weights[band, None, None] for tap in rows))
        averaged[band] = np.rint(
            functools.reduce(np.add, (narrow[:, tap.positions] * tap.weights[:, None] for tap in columns))
        )
    return averaged


@dataclass(frozen=True)
class _Tap:
    """One old pixel for each new pixel of an axis, and the share of it in the new pixel's mean."""

    positions: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def _taps(old_length: int, new_length: int) -> list[_Tap]:
    scale = old_length / new_length
    starts = np.arange(new_length) * scale
    first = np.floor(starts).astype(np.int64)
    taps: list[_Tap] = []
    for offset in range(math.ceil(scale) + 1):
        positions = first + offset
        covered = np.minimum(starts + scale, positions + 1) - np.maximum(starts, positions)
        weights = (covered.clip(min=0) / scale).astype(np.float32)
        if weights.max() > _SMALLEST_SHARE:
            taps.append(_Tap(positions.clip(max=old_length - 1), weights))
    return taps
