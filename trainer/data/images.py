"""A training picture: which pixels of which file, and how they become the autoencoder's input."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import ColourChange, change_colour
from trainer.data.buckets import Size
from trainer.data.decoding import DECODE_ERRORS, decode_failure, load_image
from trainer.data.resizing import resize
from trainer.schema.base import UserError

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = max(1, min(8, os.cpu_count() or 1))
"""Decoding releases the interpreter, so threads use that many cores."""


@dataclass(frozen=True)
class Picture:
    """A file and all that decides the pixels made from it.

    `crop` is (left, top) of `bucket` in the resized picture. With `is_masked_by_alpha` its transparency is the loss's
    mask, and changes no colour.
    """

    path: Path
    digest: str
    resized: Size
    bucket: Size
    crop: Size
    is_flipped: bool
    resize_interpolation: str | None
    is_masked_by_alpha: bool = False
    colour: ColourChange | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """All that decides the pixels, as JSON can write it. Pictures with other colours are never kept."""
        return (
            self.digest,
            self.resized,
            self.bucket,
            self.crop,
            self.is_flipped,
            self.resize_interpolation,
            self.is_masked_by_alpha,
        )


def read_pixels(picture: Picture) -> Tensor:
    """(3, height, width) float32 in [-1, 1] of the picture's bucket. Raises `UserError` when it cannot be decoded."""
    try:
        image = load_image(picture.path, is_masked_by_alpha=picture.is_masked_by_alpha)
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
    if picture.colour is not None:
        cut = change_colour(cut, picture.colour)
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
