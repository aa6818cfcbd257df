"""What a picture's caption becomes when it is drawn for a step: pure functions of the caption, its rules and an RNG."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from trainer.schema.dataset_keys import SubsetSpec

JOINER = ", "
"""Shuffled parts are joined by this whatever separated them, as in the reference trainer."""


def draw_caption(caption: str, rules: SubsetSpec, rng: random.Random) -> str:
    """The text for one step: prefix and suffix, then dropout, then shuffling.

    A dropped caption is empty, without prefix and suffix. Shuffling splits at `caption_separator`, leaves the first
    `keep_tokens` parts in place and joins with a comma and a space; a prefix belongs to the first part.
    """
    caption = _with_ends(caption, rules)
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return ""
    if not rules.shuffle_caption:
        return caption
    parts = [part.strip() for part in caption.strip().split(rules.caption_separator)]
    kept, flexible = parts[: rules.keep_tokens], parts[rules.keep_tokens :]
    rng.shuffle(flexible)
    return JOINER.join(kept + flexible)


def caption_variants(caption: str, rules: SubsetSpec) -> tuple[str, ...] | None:
    """Every text that `draw_caption` can give, or None when shuffling makes them too many to encode beforehand."""
    if rules.shuffle_caption and rules.caption_dropout_rate < 1:
        return None
    full = _with_ends(caption, rules)
    if rules.caption_dropout_rate <= 0 or not full:
        return (full,)
    return ("",) if rules.caption_dropout_rate >= 1 else (full, "")


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part occurs, lower case, in the order of first appearance."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def _with_ends(caption: str, rules: SubsetSpec) -> str:
    if rules.caption_prefix:
        caption = f"{rules.caption_prefix} {caption}"
    if rules.caption_suffix:
        caption = f"{caption} {rules.caption_suffix}"
    return caption
