"""Picture files to tensors: check, decode, resize, crop, flip, normalise."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainer.data.buckets import Size
from trainer.schema.base import UserError

# Pillow loads the plugins of rarer formats when it first meets one. Two threads that do so at the same time can both
# fail to know the format.
Image.init()

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = max(1, min(8, os.cpu_count() or 1))
"""Decoding releases the interpreter, so threads use that many cores."""

EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise for broken files."""

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


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a file that decodes: size as displayed (EXIF applied) and the SHA-256 of its bytes."""

    width: int
    height: int
    digest: str


@dataclass(frozen=True)
class Picture:
    """A file and all that decides the pixels made from it. `crop` is (left, top) of `bucket` in the resized picture."""

    path: Path
    digest: str
    resized: Size
    bucket: Size
    crop: Size
    is_flipped: bool
    resize_interpolation: str | None


def check_image(path: Path) -> ImageFacts:
    """Reads the file once and decodes all of it. Raises one of `DECODE_ERRORS` when that fails."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        # JPEG only: every bit is still read, so a truncated file is found, but little of the picture is computed.
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
        if image.getexif().get(EXIF_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
    return ImageFacts(width, height, hashlib.sha256(data).hexdigest())


def decode_failure(error: BaseException) -> str:
    """Why a picture could not be decoded, in a few plain words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return "far too many pixels"
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or "cannot be read").lower()
    return "truncated" if "truncated" in str(error).lower() else "damaged"


def load_image(path: Path) -> Image.Image:
    """The picture as RGB, upright.

    The EXIF orientation is applied, which the reference trainer does not do. Transparency is dropped, as there: what
    remains is the colour under it. 16-bit grey is scaled to 8 bits instead of saturating.
    """
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        if upright.mode == "RGB":
            return upright
        if upright.mode.startswith("I"):
            grey = np.asarray(upright).astype(np.int64) >> 8
            return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        if upright.mode in ("P", "PA"):
            # Through RGBA, because Pillow warns about palettes with transparency on the direct way.
            upright = upright.convert("RGBA")
        return upright.convert("RGB")


def resize(image: Image.Image, size: Size, method: str | None) -> Pixels:
    """(height, width, 3) of `size`.

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
            return _average_areas(np.asarray(image, dtype=np.uint8), size)
        method = "bilinear"
    if method not in _FILTERS:
        raise ValueError(f"unknown way of resizing: {method}")
    return np.array(image.resize(size, _FILTERS[method]), dtype=np.uint8)


def _average_areas(pixels: Pixels, size: Size) -> Pixels:
    """Each new pixel is the mean of the area that it covers, parts of old pixels counted as parts."""
    width, height = size
    rows, columns = _taps(pixels.shape[0], height), _taps(pixels.shape[1], width)
    averaged = np.empty((height, width, 3), dtype=np.uint8)
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


def read_pixels(picture: Picture) -> Tensor:
    """(3, height, width) float32 in [-1, 1] of the picture's bucket. Raises `UserError` when it cannot be decoded."""
    try:
        image = load_image(picture.path)
    except DECODE_ERRORS as error:
        raise UserError(
            f"{picture.path}: cannot be decoded ({decode_failure(error)})",
            hint="The file changed or vanished after the start of the run; replace it and start again.",
        ) from error
    pixels = resize(image, picture.resized, picture.resize_interpolation)
    left, top = picture.crop
    width, height = picture.bucket
    cut = pixels[top : top + height, left : left + width]
    if cut.shape[:2] != (height, width):
        raise ValueError(f"{picture.path}: {picture.bucket} does not fit into {picture.resized} at {picture.crop}")
    if picture.is_flipped:
        cut = cut[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1).contiguous()
    return (tensor.float() / 255.0 - 0.5) / 0.5


def map_ahead(
    function: Callable[[T], R], values: Iterable[T], *, num_threads: int = NUM_THREADS, num_ahead: int | None = None
) -> Generator[R, None, None]:
    """`function` of each value, in order, computed in threads up to `num_ahead` values before they are asked for.

    Closing the iterator, or an error, drops what has not begun.
    """
    remaining = iter(values)
    window: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")
    try:
        for value in itertools.islice(remaining, num_ahead or 2 * num_threads):
            window.append(pool.submit(function, value))
        while window:
            result = window.popleft().result()
            for value in itertools.islice(remaining, 1):
                window.append(pool.submit(function, value))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
