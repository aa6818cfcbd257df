"""Which files a subset consists of: those of its folder, or those that its metadata file lists, and their masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.data.decoding import JPEG_XL_PACKAGE, READS_JPEG_XL
from trainer.data.metadata_file import read_metadata_file
from trainer.schema.base import Problem
from trainer.schema.dataset_keys import DatasetSpec, SubsetSpec

_JPEG_XL = ".jxl"
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", *((_JPEG_XL,) if READS_JPEG_XL else ())))
"""Endings of picture files, in any case. The reference takes .avif only where a plugin is installed."""

OTHER_PICTURE_SUFFIXES = frozenset((".gif", ".tif", ".tiff", _JPEG_XL, ".heic", ".heif")) - IMAGE_SUFFIXES
"""Picture files that are not read; a folder that holds some gets a warning."""

NUM_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """A subset and its picture files.

    `masks` are the files beside them in `conditioning_data_dir`, none where there is no such folder; `captions` are
    those of a metadata file, None where captions have files of their own.
    """

    dataset: int
    spec: SubsetSpec
    paths: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    captions: tuple[str, ...] | None = None


def find_pictures(position: int, dataset: DatasetSpec, problems: list[Problem], warnings: list[str]) -> list[Found]:
    """The dataset's subsets with their files, sorted by name, folders inside them left out as in the reference."""
    found: list[Found] = []
    seen: set[tuple[Path | None, Path | None]] = set()
    for subset in dataset.subsets:
        if subset.num_repeats < 1:
            warnings.append(f"{subset.place} is left out: its num_repeats is {subset.num_repeats}")
            continue
        places = (_resolved(subset.image_dir), _resolved(subset.metadata_file))
        if places in seen:
            warnings.append(f"{subset.place} is given twice in one dataset; only the first one is used")
            continue
        seen.add(places)
        files = (
            _files_of_folder(position, subset, subset.image_dir, problems, warnings)
            if subset.metadata_file is None and subset.image_dir is not None
            else _files_of_metadata(position, subset, problems)
        )
        if files is not None:
            found.append(_with_masks(files, problems, warnings))
    return _each_file_once(found, warnings)


def names(every: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(every[:NUM_NAMES_SHOWN])
    rest = len(every) - NUM_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def system_reason(error: OSError) -> str:
    """Why the system refused, in its own words."""
    return (error.strerror or str(error)).lower()


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()


def _files_of_folder(
    position: int, subset: SubsetSpec, folder: Path, problems: list[Problem], warnings: list[str]
) -> Found | None:
    entries = _entries(folder, "image_dir", "picture", problems)
    if entries is None:
        return None
    paths, others = _pictures(entries)
    jpeg_xl = [path.name for path in others if path.suffix.lower() == _JPEG_XL]
    if jpeg_xl:
        hint = f"pip install {JPEG_XL_PACKAGE}"
        warnings.append(f"{folder}: {len(jpeg_xl)} JPEG XL pictures need {hint} and are left out: {names(jpeg_xl)}")
    unread = [path.name for path in others if path.suffix.lower() != _JPEG_XL]
    if unread:
        warnings.append(f"{folder}: {len(unread)} pictures of other formats are left out: {names(unread)}")
    no_files = [path.name for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_file()]
    if no_files:
        warnings.append(
            f"{folder}: {len(no_files)} folders or broken links are called like pictures: {names(no_files)}"
        )
    if paths:
        return Found(position, subset, tuple(paths))
    problems.append(_no_pictures(folder, [path for path in entries if path.is_dir()]))
    return None


def _files_of_metadata(position: int, subset: SubsetSpec, problems: list[Problem]) -> Found | None:
    listed = read_metadata_file(subset, IMAGE_SUFFIXES, problems)
    if not listed:
        return None
    return Found(position, subset, tuple(listed), captions=tuple(listed.values()))


def _entries(folder: Path, key: str, noun: str, problems: list[Problem]) -> list[Path] | None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        hint = f"Correct {key}." if folder.is_absolute() else f"Correct {key}: it was looked for in {Path.cwd()}."
        problems.append(Problem(f"the {noun} folder {folder} {what}", hint=hint))
        return None
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        problems.append(Problem(f"the {noun} folder {folder} cannot be read ({system_reason(error)})"))
        return None


def _pictures(entries: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Picture files that are read, and those that are not."""
    files = [path for path in entries if path.is_file()]
    return (
        [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES],
        [path for path in files if path.suffix.lower() in OTHER_PICTURE_SUFFIXES],
    )


def _no_pictures(folder: Path, inside: Sequence[Path]) -> Problem:
    hint = f"Put pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})."
    if inside:
        hint = f"Folders inside it, such as {inside[0].name}, are not searched; name each as a subset of its own."
    return Problem(f"the picture folder {folder} holds no pictures", hint=hint)


def _with_masks(found: Found, problems: list[Problem], warnings: list[str]) -> Found:
    """The mask of a picture is the file of the same stem, whatever its ending."""
    folder = found.spec.conditioning_data_dir
    if folder is None:
        return found
    entries = _entries(folder, "conditioning_data_dir", "mask", problems)
    if entries is None:
        return found
    by_stem: defaultdict[str, list[Path]] = defaultdict(list)
    for path in _pictures(entries)[0]:
        by_stem[path.stem].append(path)
    wanted = {path.stem for path in found.paths}
    missing = [path.name for path in found.paths if path.stem not in by_stem]
    if missing:
        hint = "A mask has the name of its picture; white all over teaches everything."
        problems.append(Problem(f"{folder}: {len(missing)} pictures have no mask: {names(missing)}", hint=hint))
    for stem, paths in by_stem.items():
        if stem in wanted and len(paths) > 1:
            listed = names([path.name for path in paths])
            problems.append(Problem(f"{folder}: there are several masks of one picture: {listed}", hint="Keep one."))
    surplus = [path.name for stem, paths in by_stem.items() if stem not in wanted for path in paths]
    if surplus:
        warnings.append(f"{folder}: {len(surplus)} masks belong to no picture: {names(surplus)}")
    if missing:
        return found
    return replace(found, masks=tuple(by_stem[path.stem][0] for path in found.paths))


def _each_file_once(found: Sequence[Found], warnings: list[str]) -> list[Found]:
    """Of a file in several subsets of a dataset the last subset's is kept, as in the reference."""
    owners = {path: place for place, subset in enumerate(found) for path in subset.paths}
    num_twice = sum(len(subset.paths) for subset in found) - len(owners)
    if num_twice == 0:
        return list(found)
    warnings.append(f"{num_twice} pictures are in several subsets of one dataset; the last one's is used")
    return [subset for place, each in enumerate(found) if (subset := _only(each, owners, place)).paths]


def _only(found: Found, owners: dict[Path, int], place: int) -> Found:
    kept = [number for number, path in enumerate(found.paths) if owners[path] == place]
    return replace(
        found,
        paths=tuple(found.paths[number] for number in kept),
        masks=tuple(found.masks[number] for number in kept) if found.masks else (),
        captions=None if found.captions is None else tuple(found.captions[number] for number in kept),
    )


def repeat_warnings(found: Iterable[Found]) -> Iterator[str]:
    """Pictures that picture_repeats names and that are not there: a name that was mistyped has no effect otherwise."""
    for subset in found:
        there = {path.name for path in subset.paths}
        gone = [name for name, _ in subset.spec.picture_repeats if name not in there]
        if gone:
            yield f"picture_repeats of {subset.spec.place} names pictures that are not there: {names(gone)}"


def all_masks(found: Iterable[Found]) -> Iterator[Path]:
    """Every mask file, each once."""
    yield from dict.fromkeys(path for subset in found for path in subset.masks)
