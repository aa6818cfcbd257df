"""One epoch's batches: a function of (index, seed, epoch), so that a resumed run continues where it stopped.

In the reference trainer the order and the random decisions come from generators whose state is lost on resume.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.augment import ColourChange, draw_colour, draw_face_crop
from trainer.data.buckets import Size, centre_crop, random_crop
from trainer.data.captions import CaptionCourse, Moment, draw_caption
from trainer.data.items import DatasetIndex, Item
from trainer.data.pictures import Mask, Picture


@dataclass(frozen=True)
class PlannedItem:
    """One draw of an item with everything that is random about it decided.

    `resized` is the size of the whole picture from which the bucket is cut at `crop` (left, top), in pixels.
    """

    item: Item
    caption: str
    is_flipped: bool
    resized: Size
    crop: Size
    colour: ColourChange | None
    loss_weight: float

    @property
    def picture(self) -> Picture:
        """The pixels to train on."""
        return self.item.picture(self.crop, is_flipped=self.is_flipped, resized=self.resized, colour=self.colour)

    @property
    def mask(self) -> Mask | None:
        """What of them counts in the loss; None for all."""
        return self.item.mask(self.crop, is_flipped=self.is_flipped, resized=self.resized)

    @property
    def is_preserved(self) -> bool:
        """Whether the model is held to its own prediction without the network instead of learning the picture."""
        return self.item.subset.custom_attributes.diff_output_preservation


@dataclass(frozen=True)
class BatchPlan:
    """Items of one size that are trained on together. `size` is (width, height) in pixels."""

    items: tuple[PlannedItem, ...]
    size: Size


def epoch_batches(
    index: DatasetIndex,
    seed: int,
    epoch: int,
    *,
    prior_loss_weight: float = 1.0,
    course: CaptionCourse | None = None,
) -> list[BatchPlan]:
    """All batches of an epoch, in order: each item as often as it repeats, buckets never mixed, all shuffled.

    Regularisation pictures get `prior_loss_weight`. Flip, crop and caption of each draw come from generators of its
    own, so they do not depend on the order or on which process draws them. What a caption loses in a token warm-up or
    in some epochs follows from where `course` puts its batch; without one nothing is lost so.
    """
    order = random.Random(f"order {seed} {epoch}")
    draws: defaultdict[tuple[int, Size], list[tuple[int, int]]] = defaultdict(list)
    for position, item in enumerate(index.items):
        draws[item.dataset, item.bucket].extend((position, repeat) for repeat in range(item.num_repeats))
    batches: list[tuple[Size, list[tuple[int, int]]]] = []
    for dataset, size in sorted(draws):
        bucket = draws[dataset, size]
        order.shuffle(bucket)
        batch_size = index.datasets[dataset].spec.batch_size
        batches.extend((size, bucket[start : start + batch_size]) for start in range(0, len(bucket), batch_size))
    order.shuffle(batches)
    num_variants = None if course is None else course.num_variants
    plans: list[BatchPlan] = []
    for place, (size, batch) in enumerate(batches):
        moment = None if course is None else course.moment(epoch, place)
        planned = (
            _plan(index.items[position], f"{seed} {epoch} {position} {repeat}", prior_loss_weight, moment, num_variants)
            for position, repeat in batch
        )
        plans.append(BatchPlan(tuple(planned), size))
    return plans


def share_of_rank(plans: Sequence[BatchPlan], rank: int, num_processes: int) -> list[BatchPlan]:
    """The batches of process `rank`: every `num_processes`-th one, the first ones again where some would lack one."""
    num_each = -(-len(plans) // num_processes)
    return [plans[(rank + turn * num_processes) % len(plans)] for turn in range(num_each)]


def _plan(
    item: Item, seed: str, prior_loss_weight: float, moment: Moment | None, num_variants: int | None
) -> PlannedItem:
    rng = random.Random(f"draw {seed}")
    # A generator of its own: the words of a caption must not decide how its picture is cut.
    words = random.Random(f"caption {seed}")
    is_flipped = item.subset.flip_aug and rng.random() < 0.5
    resized, crop = _draw_cut(item, rng)
    return PlannedItem(
        item=item,
        is_flipped=is_flipped,
        resized=resized,
        crop=crop,
        colour=draw_colour(random.Random(f"colour {seed}")) if item.subset.color_aug else None,
        caption=draw_caption(item.caption, item.subset, words, moment, num_variants=num_variants),
        loss_weight=prior_loss_weight if item.is_reg else 1.0,
    )


def _draw_cut(item: Item, rng: random.Random) -> tuple[Size, Size]:
    """(resized, crop) of a draw."""
    subset, fit = item.subset, item.fit
    if item.face is not None and subset.face_crop_aug_range is not None:
        sizes = subset.face_crop_aug_range
        return draw_face_crop(item.size, item.face, fit.bucket, sizes, rng, is_random=subset.random_crop)
    return fit.resized, random_crop(fit, rng) if subset.random_crop else centre_crop(fit)
