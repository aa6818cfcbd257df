"""What `--debug_dataset` prints: every batch of the first epoch as training would draw it."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.batches import BatchPlan, PlannedItem, epoch_batches
from trainer.train.check import CheckedRun
from trainer.train.text_plan import caption_course


def dataset_listing(checked: CheckedRun, *, num_processes: int = 1) -> Iterator[str]:
    """One block of lines for each batch: its size, and each picture with its caption and what is done to it.

    Without a seed the draws are those of seed 0; another start would draw others.
    """
    options = checked.options
    course = caption_course(options, checked.schedule, num_processes)
    batches = epoch_batches(
        checked.index, options.seed or 0, 1, prior_loss_weight=options.prior_loss_weight, course=course
    )
    for number, batch in enumerate(batches, 1):
        yield _batch_lines(number, len(batches), batch)


def _batch_lines(number: int, count: int, batch: BatchPlan) -> str:
    width, height = batch.size
    return "\n  ".join([f"batch {number} of {count}, {width}x{height}:", *(_line(item) for item in batch.items)])


def _line(planned: PlannedItem) -> str:
    item = planned.item
    facts = [f"{item.width}x{item.height}"]
    if planned.resized != item.size:
        facts.append(f"resized to {planned.resized[0]}x{planned.resized[1]}")
    if planned.resized != item.bucket:
        facts.append(f"cut at {planned.crop[0]}, {planned.crop[1]}")
    facts += [
        text
        for text, holds in (
            ("mirrored", planned.is_flipped),
            ("with other colours", planned.colour is not None),
            ("masked", planned.mask is not None),
            ("regularisation", item.is_reg),
            ("preserved", planned.is_preserved),
        )
        if holds
    ]
    return f'{item.path} ({", ".join(facts)}): "{planned.caption}"'
