"""The batches and captions of validation: nothing about them is random."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from trainer.data.batches import BatchPlan, PlannedItem
from trainer.data.buckets import Size, centre_crop
from trainer.data.captions import caption_variant
from trainer.data.items import Item


def validation_caption(item: Item) -> str:
    """The item's whole caption: nothing dropped, nothing shuffled, of several texts always the same one."""
    rules = replace(
        item.subset,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
    )
    return caption_variant(item.caption, rules, 0)


def validation_batches(items: Sequence[Item], batch_sizes: Sequence[int], limit: int | None = None) -> list[BatchPlan]:
    """Batches of one size each, cut from the middle, always in the same order; `limit` of them at most.

    `batch_sizes` are those of the datasets. With a limit the batches of the datasets and sizes take turns.
    """
    by_size: defaultdict[tuple[int, Size], list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.digest):
        by_size[item.dataset, item.bucket].append(item)
    queues: list[list[BatchPlan]] = []
    for (dataset, size), members in sorted(by_size.items(), key=lambda entry: entry[0]):
        count = batch_sizes[dataset]
        queues.append(
            [
                BatchPlan(tuple(_planned(item) for item in members[start : start + count]), size)
                for start in range(0, len(members), count)
            ]
        )
    plans = list(_in_turns(queues))
    return plans if limit is None else plans[:limit]


def _planned(item: Item) -> PlannedItem:
    return PlannedItem(
        item,
        validation_caption(item),
        is_flipped=False,
        resized=item.fit.resized,
        crop=centre_crop(item.fit),
        colour=None,
        loss_weight=1.0,
    )


def _in_turns(queues: Sequence[Sequence[BatchPlan]]) -> Iterator[BatchPlan]:
    for turn in range(max((len(queue) for queue in queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))
