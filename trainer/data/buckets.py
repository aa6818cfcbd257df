"""The bucket arithmetic, which the page's preview shares: see `trainer.schema.buckets`."""

from __future__ import annotations

from trainer.schema.buckets import (
    Fit,
    Size,
    bucket_sizes,
    centre_crop,
    fit_to_nearest,
    fit_without_upscale,
    fitter,
    random_crop,
    side_limits,
)

__all__ = [
    "Fit",
    "Size",
    "bucket_sizes",
    "centre_crop",
    "fit_to_nearest",
    "fit_without_upscale",
    "fitter",
    "random_crop",
    "side_limits",
]
