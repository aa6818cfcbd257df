"""The bucket of a picture by its dataset's options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from trainer.data import buckets
from trainer.data.buckets import Fit, Size
from trainer.schema.base import Problem
from trainer.schema.dataset_keys import DatasetSpec, SubsetSpec


def limit_problems(dataset: DatasetSpec) -> list[Problem]:
    if not dataset.enable_bucket or dataset.bucket_no_upscale:
        return []
    shortest, longest = _limits(dataset)
    problems: list[Problem] = []
    width, height = dataset.resolution
    if math.isqrt(width * height) < dataset.bucket_reso_steps:
        what = f"resolution {width}x{height} is smaller than bucket_reso_steps {dataset.bucket_reso_steps}"
        hint = "Lower bucket_reso_steps, to 16 or 32, or raise the resolution."
        return [Problem(what, hint=hint, field="bucket_reso_steps")]
    if shortest > min(dataset.resolution):
        problems.append(
            Problem(
                f"min_bucket_reso {dataset.min_bucket_reso} is above the resolution {min(dataset.resolution)}",
                hint="Lower min_bucket_reso.",
                field="min_bucket_reso",
            )
        )
    if longest < max(dataset.resolution):
        problems.append(
            Problem(
                f"max_bucket_reso {dataset.max_bucket_reso} is below the resolution {max(dataset.resolution)}",
                hint="Raise max_bucket_reso.",
                field="max_bucket_reso",
            )
        )
    return problems


def _limits(dataset: DatasetSpec) -> Size:
    return buckets.side_limits(dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps)


def bucket_fitter(dataset: DatasetSpec) -> Callable[[Size, SubsetSpec], Fit]:
    """What gives a picture of the dataset its bucket."""
    if not dataset.enable_bucket:
        return functools.partial(_fit_without_buckets, dataset.resolution)
    fit = buckets.fitter(
        dataset.resolution,
        enable_bucket=True,
        no_upscale=dataset.bucket_no_upscale,
        min_side=dataset.min_bucket_reso,
        max_side=dataset.max_bucket_reso,
        step=dataset.bucket_reso_steps,
    )
    return lambda size, _: fit(size)


def _fit_without_buckets(resolution: Size, size: Size, subset: SubsetSpec) -> Fit:
    """All get the resolution. A random crop is cut from the picture in its own size where that is large enough, as in
    the reference; otherwise it is resized to cover the resolution, which the reference does beside a cache only."""
    if subset.random_crop and size[0] >= resolution[0] and size[1] >= resolution[1]:
        return Fit(size, resolution)
    return buckets.fit_to_nearest(size, (resolution,))
