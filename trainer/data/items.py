"""The pictures of a dataset with captions, sizes and buckets, and what is told of them; plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data import buckets
from trainer.data.augment import ColourChange, Face
from trainer.data.buckets import Fit, Size
from trainer.data.pictures import Mask, Picture
from trainer.schema.dataset_keys import DatasetSpec, SubsetSpec

Progress = Callable[[int, int], None]
"""Told (done, total) after each piece of work; may raise to interrupt it."""


@dataclass(frozen=True)
class MaskFile:
    """A picture's mask in a file of its own. `is_black` says that nothing of the picture would be learnt."""

    path: Path
    digest: str
    size: Size
    is_black: bool


@dataclass(frozen=True)
class Item:
    """One picture of one dataset. `width` and `height` are those of the file as displayed.

    `caption` is the stored text, before prefix, dropout and shuffling. `num_repeats` is how often it is drawn in an
    epoch, which for regularisation pictures is set by the balance. `dataset` is the dataset's place in the file.
    `face` is known where crops are to show it.
    """

    path: Path
    digest: str
    width: int
    height: int
    caption: str
    subset: SubsetSpec
    num_repeats: int
    is_reg: bool
    dataset: int
    fit: Fit
    is_transparent: bool = False
    mask_file: MaskFile | None = None
    face: Face | None = None

    @property
    def bucket(self) -> Size:
        """Width and height in pixels of the picture that is trained on."""
        return self.fit.bucket

    @property
    def size(self) -> Size:
        """Width and height of the file as displayed."""
        return self.width, self.height

    def picture(
        self, crop: Size, *, is_flipped: bool, resized: Size | None = None, colour: ColourChange | None = None
    ) -> Picture:
        """This item's pixels with the bucket cut out at `crop` (left, top), of its size `resized` if not the usual one."""
        return Picture(
            self.path,
            self.digest,
            resized or self.fit.resized,
            self.fit.bucket,
            crop,
            is_flipped,
            self.subset.resize_interpolation,
            # With a mask of its own, or without any, transparency is what it is everywhere else.
            self._is_masked_by_alpha,
            colour,
        )

    def mask(self, crop: Size, *, is_flipped: bool, resized: Size | None = None) -> Mask | None:
        """The mask that belongs to the same `picture`; None where everything counts."""
        if self.mask_file is not None:
            path, digest, channel = self.mask_file.path, self.mask_file.digest, "red"
        elif self._is_masked_by_alpha:
            path, digest, channel = self.path, self.digest, "alpha"
        else:
            return None
        cut = resized or self.fit.resized, self.fit.bucket, crop, is_flipped
        return Mask(path, digest, channel, *cut, self.subset.resize_interpolation)

    @property
    def _is_masked_by_alpha(self) -> bool:
        return self.subset.alpha_mask and self.is_transparent and self.mask_file is None

    def centre_masks(self) -> tuple[Mask, ...]:
        """The masks of `centre_pictures`."""
        masks = (self.mask(each.crop, is_flipped=each.is_flipped) for each in self.centre_pictures())
        return tuple(mask for mask in masks if mask is not None)

    def centre_pictures(self) -> tuple[Picture, ...]:
        """The pictures to encode beforehand: cut from the middle, and mirrored too when the subset flips."""
        crop = buckets.centre_crop(self.fit)
        flips = (False, True) if self.subset.flip_aug else (False,)
        return tuple(self.picture(crop, is_flipped=is_flipped) for is_flipped in flips)


@dataclass(frozen=True)
class SubsetSummary:
    """What a subset holds, for the plan and the metadata. `tag_frequency` counts its captions' parts."""

    spec: SubsetSpec
    num_images: int
    tag_frequency: Mapping[str, int]


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset holds. Image counts include repeats, as the reference trainer's do.

    `num_reg_images` counts all that were found, before the balance. `bucket_counts` is sorted by size and counts
    draws in an epoch. `mean_aspect_error` is the mean |bucket width / height - picture width / height|, no repeats.
    """

    spec: DatasetSpec
    subsets: tuple[SubsetSummary, ...]
    num_train_images: int
    num_reg_images: int
    bucket_counts: Mapping[Size, int]
    mean_aspect_error: float

    @property
    def num_batches(self) -> int:
        """Batches in an epoch; each bucket's last one may be short."""
        return sum(math.ceil(count / self.spec.batch_size) for count in self.bucket_counts.values())


@dataclass(frozen=True)
class DatasetIndex:
    """Everything that training draws from."""

    items: tuple[Item, ...]
    datasets: tuple[DatasetSummary, ...]
    missing_captions: tuple[Path, ...]
    warnings: tuple[str, ...]
    validation: tuple[Item, ...] = ()
    """What is held back; no picture of it is among the items."""

    @property
    def num_images(self) -> int:
        """Items without repeats; a file in two datasets counts twice."""
        return len(self.items)

    @property
    def num_batches_per_epoch(self) -> int:
        return sum(dataset.num_batches for dataset in self.datasets)
