"""A picture to train on and its mask: which pixels of which file, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.data.augment import ColourChange
from trainer.data.buckets import Size

_SAME_SHAPE = 0.01


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


@dataclass(frozen=True)
class Mask:
    """A file and all that decides the mask made from it; see `Picture`."""

    path: Path
    digest: str
    channel: Literal["alpha", "red"]
    resized: Size
    bucket: Size
    crop: Size
    is_flipped: bool
    resize_interpolation: str | None

    @property
    def identity(self) -> tuple[object, ...]:
        """All that decides the numbers, as JSON can write it."""
        return (
            self.digest,
            self.channel,
            self.resized,
            self.bucket,
            self.crop,
            self.is_flipped,
            self.resize_interpolation,
        )


def has_shape_of(mask: Size, picture: Size) -> bool:
    """Whether a mask can be laid over a picture: of the same size, or of the same shape in another."""
    return abs(mask[0] * picture[1] / (mask[1] * picture[0]) - 1) <= _SAME_SHAPE
