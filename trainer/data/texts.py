"""Every text that a run trains on, so that all of them can be encoded before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.batches import epoch_batches
from trainer.data.captions import CaptionCourse, caption_texts, warmup_steps
from trainer.data.items import DatasetIndex


def run_texts(index: DatasetIndex, course: CaptionCourse, seed: int) -> dict[str, Path]:
    """Each text once, with the folder of the first picture that may have it. `course` says how many variants there are.

    A token warm-up cuts captions shorter step by step; what its draws come to is found by drawing them here as the run
    with this `seed` will.
    """
    if course.num_variants is None:
        raise ValueError("without a number of variants there is no end of texts")
    folders: dict[str, Path] = {}
    for item in index.items:
        for text in caption_texts(item.caption, item.subset, course.num_variants):
            folders.setdefault(text, item.path.parent)
    for text, folder in _warmup_texts(index, course, seed):
        folders.setdefault(text, folder)
    return folders


def _warmup_texts(index: DatasetIndex, course: CaptionCourse, seed: int) -> Iterator[tuple[str, Path]]:
    """The texts of all epochs in which a token warm-up is under way."""
    subsets = {item.subset for item in index.items if item.subset.token_warmup_step > 0}
    last = max((warmup_steps(subset, course.num_steps) for subset in subsets), default=0)
    epoch = 1
    while course.moment(epoch, 0).step < min(last, course.num_steps):
        for plan in epoch_batches(index, seed, epoch, course=course):
            for planned in plan.items:
                if planned.item.subset.token_warmup_step > 0:
                    yield planned.caption, planned.item.path.parent
        epoch += 1
