"""Which training size a picture gets, and what is cut from it: pure arithmetic on (width, height) in pixels.

The rules are those of the reference trainer (`library/train_util.py`, `library/model_util.py` of kohya-ss/sd-scripts).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Fit:
    """How a picture becomes a training picture: resize to `resized`, then cut `bucket` out of it."""

    resized: Size
    bucket: Size


def side_limits(min_side: int, max_side: int, step: int) -> Size:
    """The shortest and longest bucket side as used: the first lowered, the second raised to a multiple of `step`."""
    return min_side - min_side % step, math.ceil(max_side / step) * step


def bucket_sizes(resolution: Size, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    """All bucket sizes whose area is at most that of `resolution`, sorted.

    None where a side of `resolution` is below `step`. `min_side` and `max_side` are multiples of `step`. A small `max_side` limits the area of elongated buckets too: at
    1024 x 1024 with a longest side of 1024, every bucket but the square has a smaller area.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)} if square else set[Size]()
    for width in range(max(min_side, step), max_side + 1, step):
        height = min(max_side, area // width // step * step)
        if height >= max(min_side, step):
            sizes.update(((width, height), (height, width)))
    return tuple(sorted(sizes))


def fit_to_nearest(size: Size, sizes: Sequence[Size]) -> Fit:
    """The bucket for a picture of `size`: the same size, else the nearest width / height (the first one on ties).

    The picture is scaled, up or down, until it covers the bucket. Raises `ValueError` when there is no bucket.
    """
    if not sizes:
        raise ValueError("the resolution is smaller than a step between buckets")
    width, height = size
    aspect = width / height
    bucket = size if size in sizes else min(sizes, key=lambda each: abs(each[0] / each[1] - aspect))
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return Fit((int(width * scale + 0.5), int(height * scale + 0.5)), bucket)


def fit_without_upscale(size: Size, resolution: Size, step: int) -> Fit:
    """The bucket for a picture of `size` that is never enlarged; the sides have no limits but the area.

    Raises `ValueError` when a side would be shorter than `step`: there is no such bucket.
    """
    resized = size if size[0] * size[1] <= resolution[0] * resolution[1] else _shrink_to_area(size, resolution, step)
    bucket = (resized[0] - resized[0] % step, resized[1] - resized[1] % step)
    if min(bucket) < step:
        raise ValueError(f"a side is shorter than {step} pixels at the training size {resized[0]}x{resized[1]}")
    return Fit(resized, bucket)


def _shrink_to_area(size: Size, resolution: Size, step: int) -> Size:
    """Either the width or the height becomes a multiple of `step`, whichever keeps the shape better."""
    area = resolution[0] * resolution[1]
    aspect = size[0] / size[1]
    ideal_width = math.sqrt(area * aspect)
    by_width = _to_steps(ideal_width, step)
    by_height = _to_steps(area / ideal_width, step)
    if not by_width or not by_height:
        # One axis is below a step: the reference divides by zero here.
        return int(ideal_width + 0.5), int(area / ideal_width + 0.5)
    height_of_width = _to_steps(by_width / aspect, step)
    width_of_height = _to_steps(by_height * aspect, step)
    error_by_width = abs(by_width / height_of_width - aspect) if height_of_width else math.inf
    if error_by_width < abs(width_of_height / by_height - aspect):
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _to_steps(value: float, step: int) -> int:
    whole = int(value + 0.5)
    return whole - whole % step


def centre_crop(fit: Fit) -> Size:
    """(left, top) of the bucket in the middle of the resized picture."""
    return (fit.resized[0] - fit.bucket[0]) // 2, (fit.resized[1] - fit.bucket[1]) // 2


def random_crop(fit: Fit, rng: random.Random) -> Size:
    """(left, top) of the bucket anywhere in the resized picture."""
    return (
        rng.randint(0, fit.resized[0] - fit.bucket[0]),
        rng.randint(0, fit.resized[1] - fit.bucket[1]),
    )


def fitter(
    resolution: Size, *, enable_bucket: bool, no_upscale: bool, min_side: int, max_side: int, step: int
) -> Callable[[Size], Fit]:
    """What gives a picture of a size its bucket, for a dataset's settings. The given function may raise `ValueError`."""
    if not enable_bucket:
        return lambda size: fit_to_nearest(size, (resolution,))
    if no_upscale:
        return lambda size: fit_without_upscale(size, resolution, step)
    shortest, longest = side_limits(min_side, max_side, step)
    sizes = bucket_sizes(resolution, shortest, longest, step)
    return lambda size: fit_to_nearest(size, sizes)
