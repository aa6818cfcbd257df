"""Dataset folders to items: which pictures there are, their captions, sizes and buckets, and all that is wrong."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from trainer.data import buckets
from trainer.data.augment import ColourChange, Face, face_of
from trainer.data.buckets import Fit, Size
from trainer.data.captions import tag_frequency
from trainer.data.decoding import DECODE_ERRORS, ImageFacts, UnfitPicture, check_image, decode_failure, load_red
from trainer.data.images import Picture, map_ahead
from trainer.data.listing import Found, all_masks, find_pictures, names, system_reason
from trainer.data.masks import Mask, has_shape_of
from trainer.data.picture_notes import picture_notes
from trainer.data.validation_split import split_validation
from trainer.schema.base import Problem, UserError
from trainer.schema.dataset_keys import DatasetConfig, DatasetSpec, SubsetSpec

T = TypeVar("T")

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


@dataclass(frozen=True)
class _Caption:
    """`text` is None when no caption file was found."""

    text: str | None
    has_more_lines: bool = False
    is_empty_file: bool = False


def index_dataset(config: DatasetConfig, *, progress: Progress | None = None) -> DatasetIndex:
    """Finds, decodes and measures every picture of `config`.

    Raises one `UserError` with every problem: folders that are missing or hold no pictures, pictures that cannot be
    decoded, captions that are not text, and sizes that fit no bucket. `progress` is told of each decoded file.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    found: list[Found] = []
    for position, dataset in enumerate(config.datasets):
        problems.extend(_limit_problems(dataset))
        found.extend(find_pictures(position, dataset, problems, warnings))
    facts, masks = _check_files(found, problems, progress)
    captions = {subset: _read_captions(subset, problems) for subset in found}
    items = _make_items(config, found, facts, masks, captions, problems)
    if problems:
        raise UserError.many(problems, exit_code=3)
    split = split_validation(items, config)
    warnings.extend(split.warnings)
    items = list(split.training)
    drawn = [_balance(position, items, warnings) for position in range(len(config.datasets))]
    missing = tuple(dict.fromkeys(path for subset in found for path in _missing(subset, captions[subset])))
    warnings.extend(_caption_warnings(found, captions, missing))
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


# ---- captions --------------------------------------------------------------------------------------------------


def _read_captions(subset: Found, problems: list[Problem]) -> tuple[_Caption, ...]:
    if subset.captions is not None:
        return tuple(_Caption(text) for text in subset.captions)
    captions: list[_Caption] = []
    for path in subset.paths:
        file = _caption_file(path, subset.spec.caption_extension)
        try:
            captions.append(
                _Caption(None) if file is None else _read_caption(file, all_lines=subset.spec.enable_wildcard)
            )
        except (UnicodeError, OSError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeError) else system_reason(error)
            hint = "Save it as UTF-8." if isinstance(error, UnicodeError) else None
            problems.append(Problem(f"{file}: the caption cannot be read ({reason})", hint=hint))
            captions.append(_Caption(""))
    return tuple(captions)


def _caption_file(path: Path, extension: str) -> Path | None:
    """The file beside the picture with its stem; or without the four numbers that face detection appends to names."""
    extension = extension if extension.startswith(".") else f".{extension}"
    parts = path.stem.split("_")
    stems = [path.stem, "_".join(parts[:-4])] if len(parts) >= 5 else [path.stem]
    candidates = (path.with_name(stem + extension) for stem in stems)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_caption(file: Path, *, all_lines: bool) -> _Caption:
    """The first line without spaces around it, or `all_lines` that are not blank, of which wildcards draw one.

    A file without any line, an error in the reference, is an empty one.
    """
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    if not any(line.strip() for line in lines):
        return _Caption("", is_empty_file=True)
    if all_lines:
        return _Caption("\n".join(line.strip() for line in lines if line.strip()))
    return _Caption(lines[0].strip(), has_more_lines=any(line.strip() for line in lines[1:]))


def _missing(subset: Found, captions: Sequence[_Caption]) -> list[Path]:
    return [path for path, caption in zip(subset.paths, captions, strict=True) if caption.text is None]


def _caption_warnings(
    found: Sequence[Found], captions: Mapping[Found, Sequence[_Caption]], missing: Sequence[Path]
) -> list[str]:
    """One warning for each kind, with names."""
    warnings: list[str] = []
    pairs = [pair for subset in found for pair in zip(subset.paths, captions[subset], strict=True)]
    num_paths = len({path for path, _ in pairs})
    if missing:
        extensions = sorted({subset.spec.caption_extension for subset in found})
        text = (
            f"{len(missing)} of {num_paths} pictures have no caption file ({', '.join(extensions)}) and train with "
            f"their class tokens, or with an empty caption where there are none: {names([p.name for p in missing])}"
        )
        num_other = sum(1 for path in missing if any(path.with_suffix(end).is_file() for end in (".txt", ".caption")))
        if num_other:
            text += f". {num_other} of them have a .txt or .caption file: is caption_extension right?"
        warnings.append(text)
    empty = list(dict.fromkeys(path.name for path, caption in pairs if caption.is_empty_file))
    if empty:
        warnings.append(f"{len(empty)} caption files are empty: {names(empty)}")
    longer = list(dict.fromkeys(path.name for path, caption in pairs if caption.has_more_lines))
    if longer:
        warnings.append(f"{len(longer)} caption files have several lines; the first one is used: {names(longer)}")
    return warnings


# ---- items -----------------------------------------------------------------------------------------------------


def _limit_problems(dataset: DatasetSpec) -> list[Problem]:
    if not dataset.enable_bucket or dataset.bucket_no_upscale:
        return []
    shortest, longest = _limits(dataset)
    problems: list[Problem] = []
    if shortest > min(dataset.resolution):
        problems.append(
            Problem(
                f"min_bucket_reso {dataset.min_bucket_reso} is above the resolution {min(dataset.resolution)}",
                hint="Lower min_bucket_reso.",
                field="min_bucket_reso",
            )
        )
    if longest < max(dataset.resolution):
        problems.append(
            Problem(
                f"max_bucket_reso {dataset.max_bucket_reso} is below the resolution {max(dataset.resolution)}",
                hint="Raise max_bucket_reso.",
                field="max_bucket_reso",
            )
        )
    return problems


def _limits(dataset: DatasetSpec) -> Size:
    return buckets.side_limits(dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps)


def _fitter(dataset: DatasetSpec) -> Callable[[Size, SubsetSpec], Fit]:
    """What gives a picture of the dataset its bucket."""
    if not dataset.enable_bucket:
        return functools.partial(_fit_without_buckets, dataset.resolution)
    fit = buckets.fitter(
        dataset.resolution,
        enable_bucket=True,
        no_upscale=dataset.bucket_no_upscale,
        min_side=dataset.min_bucket_reso,
        max_side=dataset.max_bucket_reso,
        step=dataset.bucket_reso_steps,
    )
    return lambda size, _: fit(size)


def _fit_without_buckets(resolution: Size, size: Size, subset: SubsetSpec) -> Fit:
    """All get the resolution. A random crop is cut from the picture in its own size where that is large enough, as in
    the reference; otherwise it is resized to cover the resolution, which the reference does beside a cache only."""
    if subset.random_crop and size[0] >= resolution[0] and size[1] >= resolution[1]:
        return Fit(size, resolution)
    return buckets.fit_to_nearest(size, (resolution,))


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _make_items(
    config: DatasetConfig,
    found: Sequence[Found],
    facts: Mapping[Path, ImageFacts],
    masks: Mapping[Path, MaskFile],
    captions: Mapping[Found, Sequence[_Caption]],
    problems: list[Problem],
) -> list[Item]:
    fitters = [_fitter(dataset) for dataset in config.datasets]
    items: list[Item] = []
    for subset in found:
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
                    num_repeats=subset.spec.num_repeats,
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

    def captions(subset: Found) -> list[str]:
        return [item.caption for item in items if item.subset is subset.spec and item.dataset == subset.dataset]

    return DatasetSummary(
        spec=spec,
        subsets=tuple(
            SubsetSummary(subset.spec, len(captions(subset)), tag_frequency(captions(subset))) for subset in found
        ),
        num_train_images=sum(len(captions(s)) * s.spec.num_repeats for s in found if not s.spec.is_reg),
        num_reg_images=sum(len(captions(s)) * s.spec.num_repeats for s in found if s.spec.is_reg),
        bucket_counts={size: counts[size] for size in sorted(counts)},
        mean_aspect_error=sum(errors) / len(errors) if errors else 0.0,
    )
