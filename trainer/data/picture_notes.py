"""What a user should know of the pictures before they are trained on: one line for each kind, with names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.data.decoding import ImageFacts
from trainer.data.items import Item
from trainer.data.listing import names
from trainer.schema.dataset_keys import DatasetSpec

_MUCH_OF_A_PICTURE = 0.5


def picture_notes(
    items: Sequence[Item], facts: Mapping[Path, ImageFacts], datasets: Sequence[DatasetSpec]
) -> Iterator[str]:
    """Lines about pictures that are not used just as they are, or as their settings ask."""

    def line(chosen: Sequence[str], what: str) -> Iterator[str]:
        every = list(dict.fromkeys(chosen))
        if every:
            yield f"{len(every)} {what}: {names(every)}"

    yield from line(
        [path.name for path, fact in facts.items() if fact.is_animated],
        "pictures are animated; the first frame is used",
    )
    yield from line(
        [path.name for path, fact in facts.items() if fact.is_cmyk],
        "pictures are in CMYK, the colours of printing, and become RGB; save them as RGB to decide how",
    )
    yield from line(
        [f"{path.name} is {fact.other_format}" for path, fact in facts.items() if fact.other_format is not None],
        "pictures have the ending of another format and are used all the same; rename them to be safe",
    )
    yield from line(
        [path.name for path, fact in facts.items() if fact.has_profile],
        "pictures have a colour profile of their own and are converted to sRGB",
    )
    yield from line(
        [
            item.path.name
            for item in items
            if item.is_transparent and not (item.subset.alpha_mask and item.mask_file is None)
        ],
        "pictures are transparent in places; these become white (alpha_mask leaves them out of the loss instead)",
    )
    yield from line(
        [item.mask_file.path.name for item in items if item.mask_file is not None and item.mask_file.is_black],
        "masks are black all over; their pictures teach nothing",
    )
    yield from line(
        [item.path.name for item in items if _kept_part(item) < _MUCH_OF_A_PICTURE],
        "pictures lose more than half of their area to the crop",
    )
    yield from line(
        [
            item.path.name
            for item in items
            if item.face is None
            and item.subset.face_crop_aug_range is not None
            and not datasets[item.dataset].enable_bucket
        ],
        "pictures have no face in their names, such as cat_320_200_90_120, and are cropped as usual",
    )


def _kept_part(item: Item) -> float:
    if item.subset.random_crop or item.face is not None:
        return 1.0  # Another part of it is seen every time.
    return item.bucket[0] * item.bucket[1] / (item.fit.resized[0] * item.fit.resized[1])
