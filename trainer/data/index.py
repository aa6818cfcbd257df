"""Dataset folders to items: which pictures there are, their captions, sizes and buckets, and all that is wrong."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from trainer.data.ahead import map_ahead
from trainer.data.augment import face_of
from trainer.data.bucket_choice import bucket_fitter, limit_problems
from trainer.data.buckets import Size
from trainer.data.caption_files import Caption, caption_warnings, missing_captions, read_captions
from trainer.data.captions import tag_frequency
from trainer.data.decoding import DECODE_ERRORS, ImageFacts, UnfitPicture, check_image, decode_failure, load_red
from trainer.data.items import DatasetIndex, DatasetSummary, Item, MaskFile, Progress, SubsetSummary
from trainer.data.listing import Found, all_masks, find_pictures, repeat_warnings
from trainer.data.picture_notes import picture_notes
from trainer.data.pictures import has_shape_of
from trainer.data.validation_split import split_validation
from trainer.schema.base import Problem, UserError
from trainer.schema.dataset_keys import DatasetConfig, DatasetSpec

T = TypeVar("T")

_MOST_DRAWS = 50_000_000
"""An epoch is made as a list; this many take gigabytes already."""


def index_dataset(config: DatasetConfig, *, progress: Progress | None = None) -> DatasetIndex:
    """Finds, decodes and measures every picture of `config`.

    Raises one `UserError` with every problem: folders that are missing or hold no pictures, pictures that cannot be
    decoded, captions that are not text, and sizes that fit no bucket. `progress` is told of each decoded file.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    found: list[Found] = []
    without_buckets: set[int] = set()
    for position, dataset in enumerate(config.datasets):
        wrong_limits = limit_problems(dataset)
        if wrong_limits:
            without_buckets.add(position)
            problems.extend(wrong_limits)
        found.extend(find_pictures(position, dataset, problems, warnings))
    facts, masks = _check_files(found, problems, progress)
    captions = {subset: read_captions(subset, problems) for subset in found}
    fitting = [subset for subset in found if subset.dataset not in without_buckets]
    items = _make_items(config, fitting, facts, masks, captions, problems)
    if problems:
        raise UserError.many(problems, exit_code=3)
    split = split_validation(items, config)
    warnings.extend(split.warnings)
    items = list(split.training)
    drawn = [_balance(position, items, warnings) for position in range(len(config.datasets))]
    missing = tuple(dict.fromkeys(path for subset in found for path in missing_captions(subset, captions[subset])))
    warnings.extend(caption_warnings(found, captions, missing))
    warnings.extend(repeat_warnings(found))
    warnings.extend(picture_notes(items, facts, config.datasets))
    return DatasetIndex(
        items=tuple(item for dataset in drawn for item in dataset),
        datasets=tuple(
            _summarise(dataset, [subset for subset in found if subset.dataset == position], items, drawn[position])
            for position, dataset in enumerate(config.datasets)
        ),
        missing_captions=missing,
        warnings=tuple(warnings),
        validation=split.validation,
    )


# ---- files -----------------------------------------------------------------------------------------------------


def _check_files(
    found: Sequence[Found], problems: list[Problem], progress: Progress | None
) -> tuple[dict[Path, ImageFacts], dict[Path, MaskFile]]:
    """What is known of every picture and every mask; those that do not decode are problems."""
    paths = tuple(dict.fromkeys(path for subset in found for path in subset.paths))
    masks = tuple(all_masks(found))
    checks = [
        *(functools.partial(check_image, path) for path in paths),
        *(functools.partial(_check_mask, path) for path in masks),
    ]
    facts: dict[Path, ImageFacts] = {}
    mask_files: dict[Path, MaskFile] = {}
    with contextlib.closing(map_ahead(_result_or_problem, zip((*paths, *masks), checks, strict=True))) as results:
        for done, (path, result) in enumerate(zip((*paths, *masks), results, strict=True), start=1):
            if isinstance(result, Problem):
                problems.append(result)
            elif isinstance(result, MaskFile):
                mask_files[path] = result
            else:
                facts[path] = result
            if progress is not None:
                progress(done, len(checks))
    return facts, mask_files


def _check_mask(path: Path) -> MaskFile:
    facts = check_image(path)
    brightest = cast("tuple[int, int]", load_red(path).getextrema())[1]
    return MaskFile(path, facts.digest, (facts.width, facts.height), brightest == 0)


def _result_or_problem(check: tuple[Path, Callable[[], T]]) -> T | Problem:
    path, work = check
    try:
        return work()
    except UnfitPicture as error:
        return Problem(f"{path}: {error}", hint=error.hint)
    except DECODE_ERRORS as error:
        return Problem(f"{path}: cannot be decoded ({decode_failure(error)})", hint="Replace it or remove it.")


# ---- items -----------------------------------------------------------------------------------------------------


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _make_items(
    config: DatasetConfig,
    found: Sequence[Found],
    facts: Mapping[Path, ImageFacts],
    masks: Mapping[Path, MaskFile],
    captions: Mapping[Found, Sequence[Caption]],
    problems: list[Problem],
) -> list[Item]:
    fitters = [bucket_fitter(dataset) for dataset in config.datasets]
    items: list[Item] = []
    for subset in found:
        repeats = dict(subset.spec.picture_repeats)
        has_buckets = config.datasets[subset.dataset].enable_bucket
        mask_paths = subset.masks or [None] * len(subset.paths)
        for path, caption, mask_path in zip(subset.paths, captions[subset], mask_paths, strict=True):
            fact = facts.get(path)
            if fact is None:
                continue
            mask = None if mask_path is None else masks.get(mask_path)
            if mask is not None and not has_shape_of(mask.size, (fact.width, fact.height)):
                what = f"{mask.path}: this mask is {_by(mask.size)}, but its picture {_by((fact.width, fact.height))}"
                problems.append(Problem(what, hint="Make the mask of the picture's size."))
                continue
            try:
                fit = fitters[subset.dataset]((fact.width, fact.height), subset.spec)
            except ValueError as error:
                hint = "Turn off bucket_no_upscale, lower bucket_reso_steps, or remove the picture."
                problems.append(Problem(f"{path}: {fact.width}x{fact.height} fits no bucket ({error})", hint=hint))
                continue
            text = caption.text if caption.text is not None else (subset.spec.class_tokens or "")
            items.append(
                Item(
                    path=path,
                    digest=fact.digest,
                    width=fact.width,
                    height=fact.height,
                    caption=text,
                    subset=subset.spec,
                    num_repeats=subset.spec.num_repeats * repeats.get(path.name, 1),
                    is_reg=subset.spec.is_reg,
                    dataset=subset.dataset,
                    fit=fit,
                    is_transparent=fact.is_transparent,
                    mask_file=mask,
                    face=None if has_buckets or subset.spec.face_crop_aug_range is None else face_of(path),
                )
            )
    for position in range(len(config.datasets)):
        kinds = {subset.spec.is_reg for subset in found if subset.dataset == position}
        if kinds == {True}:
            problems.append(
                Problem(f"dataset {position + 1} has only regularisation pictures", hint="Add pictures to train on.")
            )
    draws = sum(item.num_repeats for item in items)
    if draws > _MOST_DRAWS:
        problems.append(Problem(f"an epoch would have {draws} draws of pictures", hint="Lower num_repeats."))
    if not found and not problems:
        problems.append(Problem("the dataset file names no picture folder", hint="Add a subset with an image_dir."))
    return items


def _balance(position: int, items: Sequence[Item], warnings: list[str]) -> list[Item]:
    """The items of one dataset, those for regularisation last and drawn about as often as the others together.

    The reference's rule: they join in order, with their repeats, until there are as many draws as of the others. When
    they run out first, each gets one more repeat in turn. Those that are not needed are left out.
    """
    train = [item for item in items if item.dataset == position and not item.is_reg]
    reg = [item for item in items if item.dataset == position and item.is_reg]
    if not reg:
        return train
    wanted = sum(item.num_repeats for item in train)
    used: list[Item] = []
    draws = 0
    for item in reg:
        if draws >= wanted:
            break
        used.append(item)
        draws += item.num_repeats
    more, left_over = divmod(max(wanted - draws, 0), len(used))
    used = [
        replace(item, num_repeats=item.num_repeats + more + (1 if place < left_over else 0))
        for place, item in enumerate(used)
    ]
    if len(used) < len(reg):
        warnings.append(
            f"{len(reg) - len(used)} of {len(reg)} regularisation pictures are not used: "
            "there are fewer draws of training pictures in an epoch"
        )
    return train + used


def _summarise(
    spec: DatasetSpec, found: Sequence[Found], items: Sequence[Item], drawn: Sequence[Item]
) -> DatasetSummary:
    counts: Counter[Size] = Counter()
    for item in drawn:
        counts[item.bucket] += item.num_repeats
    errors = [abs(item.bucket[0] / item.bucket[1] - item.width / item.height) for item in drawn]

    def of(subset: Found) -> list[Item]:
        return [item for item in items if item.subset is subset.spec and item.dataset == subset.dataset]

    def captions(subset: Found) -> list[str]:
        return [item.caption for item in of(subset)]

    def num_draws(*, is_reg: bool) -> int:
        # Before the regularisation pictures are balanced.
        return sum(item.num_repeats for subset in found if subset.spec.is_reg is is_reg for item in of(subset))

    return DatasetSummary(
        spec=spec,
        subsets=tuple(
            SubsetSummary(subset.spec, len(captions(subset)), tag_frequency(captions(subset))) for subset in found
        ),
        num_train_images=num_draws(is_reg=False),
        num_reg_images=num_draws(is_reg=True),
        bucket_counts={size: counts[size] for size in sorted(counts)},
        mean_aspect_error=sum(errors) / len(errors) if errors else 0.0,
    )
