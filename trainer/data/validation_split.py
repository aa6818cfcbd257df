"""Which pictures are held back from training to measure it on.

It follows from their content and a seed, so that it is the same in every run, whatever the files are called. (The
reference trainer shuffles training and validation apart without a seed, and its counts overlap with one.)
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.data.items import Item
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import DatasetConfig, DatasetSpec

USUAL_SEED = 0
"""Decides where no `validation_seed` is given; not the run's seed, so that runs can be compared."""


@dataclass(frozen=True)
class Split:
    """Items to train on and items to validate on; no picture is in both, not even as a copy under another name."""

    training: tuple[Item, ...]
    validation: tuple[Item, ...]
    warnings: tuple[str, ...]


def split_validation(items: Sequence[Item], config: DatasetConfig) -> Split:
    """Holds back `validation_split` of each subset's pictures, in whole numbers, at least one in each dataset.

    Copies count as one picture, and what one dataset holds back no other trains on. Regularisation pictures are never
    validated on. Raises `UserError` when nothing is left to train on.
    """
    held: set[str] = set()
    warnings: list[str] = []
    for position, dataset in enumerate(config.datasets):
        if dataset.validation_split > 0:
            found = _held_back(position, dataset, items)
            if not found:
                warnings.append(
                    f"dataset {position + 1} holds too few different pictures to hold any back for validation"
                )
            held |= found
    training = tuple(item for item in items if item.digest not in held)
    if held and not any(not item.is_reg for item in training):
        raise UserError(
            "validation_split leaves no picture to train on",
            "validation_split",
            "Lower it, or add pictures.",
            field="validation_split",
            exit_code=3,
        )
    validation: dict[tuple[int, str], Item] = {}
    for item in items:
        if item.digest in held and not item.is_reg and config.datasets[item.dataset].validation_split > 0:
            validation.setdefault((item.dataset, item.digest), replace(item, num_repeats=1))
    return Split(training, tuple(validation.values()), tuple(warnings))


def _held_back(position: int, dataset: DatasetSpec, items: Sequence[Item]) -> set[str]:
    """The digests of what this dataset holds back: fewer than it has."""
    by_subset: defaultdict[int, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for item in items:
        if item.dataset == position and not item.is_reg and item.digest not in seen:
            seen.add(item.digest)
            by_subset[dataset.subsets.index(item.subset)].add(item.digest)
    seed = USUAL_SEED if dataset.validation_seed is None else dataset.validation_seed
    ordered = {
        number: sorted(digests, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
        for number, digests in by_subset.items()
    }
    held = {
        digest
        for digests in ordered.values()
        # Half of a picture is one: Python's own rounding makes none of one half.
        for digest in digests[: int(len(digests) * dataset.validation_split + 0.5)]
    }
    if not held and len(seen) > 1:
        largest = max(ordered.values(), key=len)
        held = {largest[0]}
    if len(held) == len(seen):
        held -= {min(held)} if held else set()
    return held
