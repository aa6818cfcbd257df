"""One epoch's batches: a function of (index, seed, epoch), so that a resumed run continues where it stopped.

In the reference trainer the order and the random decisions come from generators whose state is lost on resume.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.buckets import Size, centre_crop, random_crop
from trainer.data.captions import draw_caption
from trainer.data.images import Picture
from trainer.data.index import DatasetIndex, Item


@dataclass(frozen=True)
class PlannedItem:
    """One draw of an item with everything that is random about it decided. `crop` is (left, top) in pixels."""

    item: Item
    caption: str
    is_flipped: bool
    crop: Size
    loss_weight: float

    @property
    def picture(self) -> Picture:
        """The pixels to train on."""
        return self.item.picture(self.crop, is_flipped=self.is_flipped)


@dataclass(frozen=True)
class BatchPlan:
    """Items of one size that are trained on together. `size` is (width, height) in pixels."""

    items: tuple[PlannedItem, ...]
    size: Size


def epoch_batches(index: DatasetIndex, seed: int, epoch: int, *, prior_loss_weight: float = 1.0) -> list[BatchPlan]:
    """All batches of an epoch, in order: each item as often as it repeats, buckets never mixed, all shuffled.

    Regularisation pictures get `prior_loss_weight`. Flip, crop and caption of each draw come from a generator of its
    own, so they do not depend on the order or on which process draws them.
    """
    order = random.Random(f"order {seed} {epoch}")
    draws: defaultdict[tuple[int, Size], list[tuple[int, int]]] = defaultdict(list)
    for position, item in enumerate(index.items):
        draws[item.dataset, item.bucket].extend((position, repeat) for repeat in range(item.num_repeats))
    plans: list[BatchPlan] = []
    for dataset, size in sorted(draws):
        bucket = draws[dataset, size]
        order.shuffle(bucket)
        batch_size = index.datasets[dataset].spec.batch_size
        for start in range(0, len(bucket), batch_size):
            planned = (
                _plan(index.items[position], f"draw {seed} {epoch} {position} {repeat}", prior_loss_weight)
                for position, repeat in bucket[start : start + batch_size]
            )
            plans.append(BatchPlan(tuple(planned), size))
    order.shuffle(plans)
    return plans


def share_of_rank(plans: Sequence[BatchPlan], rank: int, num_processes: int) -> list[BatchPlan]:
    """The batches of process `rank`: every `num_processes`-th one, the first ones again where some would lack one."""
    num_each = -(-len(plans) // num_processes)
    return [plans[(rank + turn * num_processes) % len(plans)] for turn in range(num_each)]


def _plan(item: Item, seed: str, prior_loss_weight: float) -> PlannedItem:
    rng = random.Random(seed)
    return PlannedItem(
        item=item,
        is_flipped=item.subset.flip_aug and rng.random() < 0.5,
        crop=random_crop(item.fit, rng) if item.subset.random_crop else centre_crop(item.fit),
        caption=draw_caption(item.caption, item.subset, rng),
        loss_weight=prior_loss_weight if item.is_reg else 1.0,
    )
