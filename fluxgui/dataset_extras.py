"""What a dataset's folder holds beside pictures and captions: masks of the loss, and how often pictures are repeated.

Masks lie in the folder `masks` inside, each named like its picture; the trainer reads them as `conditioning_data_dir`.
Repeats are a small JSON file in the folder, so that they go where it goes. No gradio.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from PIL import Image

from fluxgui.dataset_history import Written, keep_files, write_files
from fluxgui.datasets import MASKS, Dataset, Item, picture_path
from fluxgui.language import say
from fluxgui.pictures import DECODE_ERRORS, IMAGE_SUFFIXES, MAX_FILES, read_folder, safe_name, why_unreadable
from trainer.schema.base import UserError
from trainer.schema.settings import is_allowed

REPEATS_FILE: Final = ".fluxgui-repeats.json"
MAX_REPEATS: Final = 1000
SAME_SHAPE: Final = 0.01
"""How much the shapes of picture and mask may differ, as the trainer has it."""
_MASK_ENDINGS: Final = ("_mask", "-mask", ".mask")


@dataclass(frozen=True)
class Repeats:
    """How often the folder is repeated in an epoch (None while nobody set it), and single pictures beyond that, by file
    name."""

    folder: int | None = None
    pictures: Mapping[str, int] = field(default_factory=dict[str, int])

    def of(self, name: str) -> int:
        return self.pictures.get(name, 1)


@dataclass(frozen=True)
class Extras:
    """`masks` are mask files by the stem of their pictures; one is used, several of a picture are a mistake."""

    masks: Mapping[str, tuple[Path, ...]]
    repeats: Repeats

    def mask_of(self, name: str) -> Path | None:
        return next(iter(self.masks.get(Path(name).stem, ())), None)


@dataclass(frozen=True)
class AddedMasks:
    """The pictures that got a mask, and one line for each file that was left out."""

    pictures: tuple[str, ...]
    refused: tuple[str, ...]


def read_extras(dataset: Dataset) -> Extras:
    return Extras(read_masks(dataset.path), read_repeats(dataset.path))


# ------------------------------------------------------------------------------------------------------------ masks


def all_masks(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The mask files of a folder by stem, all of each, as the trainer finds them; empty where there are none."""
    found: dict[str, tuple[Path, ...]] = {}
    for path in _mask_files(folder):
        if path.is_file():
            found[path.stem] = (*found.get(path.stem, ()), path)
    return found


def read_masks(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The masks that the page shows: none behind a link that leads out of the allowed folders."""
    shown = {stem: tuple(path for path in paths if is_allowed(path)) for stem, paths in all_masks(folder).items()}
    return {stem: paths for stem, paths in shown.items() if paths}


def _mask_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in (folder / MASKS).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    except OSError:
        return []


def _going(dataset: Dataset, stems: Collection[str]) -> list[str]:
    """Everything that stands in the place of these pictures' masks, links too, as seen from the dataset's folder.

    Raises `UserError` when the folder of masks is a link that leads out of the allowed folders.
    """
    folder = dataset.path / MASKS
    if not is_allowed(folder):
        raise UserError(say("dataset.not_allowed"), str(folder), say("dataset.not_allowed_hint"))
    files = [path for path in _mask_files(dataset.path) if path.is_file() or path.is_symlink()]
    return [f"{MASKS}/{path.name}" for path in files if path.stem in stems]


def mask_path(dataset: Dataset, name: str) -> Path | None:
    """The mask of the picture of that name, or None; never a file behind a link that leads out of the allowed folders."""
    return read_extras(dataset).mask_of(name) if picture_path(dataset, name) is not None else None


def add_masks(dataset: Dataset, files: Sequence[Path]) -> AddedMasks:
    """Take in masks, each for the picture of its name, with or without an ending such as "_mask", as one change.

    A mask that is replaced goes to the bin. Raises `OSError` when the folder cannot be written, and `UserError` when it
    may not be.
    """
    by_stem = {path.stem: path for path in reversed(read_folder(dataset.path).images)}
    chosen: dict[str, Path] = {}
    refused: list[str] = []
    for file in files[:MAX_FILES]:
        stem = _stem_of_picture(file.stem, by_stem)
        if stem is None:
            refused.append(f"{file.name}: {say('dataset.mask_of_nothing')}")
        elif stem in chosen:
            refused.append(f"{file.name}: {say('dataset.mask_twice', name=by_stem[stem].name)}")
        elif (reason := _why_no_mask(file, by_stem[stem])) is not None:
            refused.append(f"{file.name}: {reason}")
        else:
            chosen[stem] = file
    if len(files) > MAX_FILES:
        refused.append(say("dataset.too_many", more=len(files) - MAX_FILES, most=MAX_FILES))
    _put(dataset, chosen, say("dataset.step_masks", count=len(chosen)))
    return AddedMasks(tuple(by_stem[stem].name for stem in chosen), tuple(refused))


def add_white_masks(dataset: Dataset) -> int:
    """A mask that teaches everything for each picture without one, as one change: the trainer wants one for each.

    Returns how many that is. Raises `OSError` and `UserError`; pictures that cannot be read get none.
    """
    there = read_masks(dataset.path)
    made: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="fluxgui-masks-") as folder:
        for image in read_folder(dataset.path).images:
            size = _size(image)
            if image.stem in there or image.stem in made or size is None:
                continue
            made[image.stem] = Path(folder) / f"{len(made)}.png"
            Image.new("L", size, 255).save(made[image.stem])
        _put(dataset, made, say("dataset.step_white_masks", count=len(made)))
    return len(made)


def delete_masks(dataset: Dataset, items: Sequence[Item]) -> int:
    """Move the masks of these pictures to the bin, as one change. Returns how many files that is; raises `UserError`."""
    going = _going(dataset, {Path(item.name).stem for item in items})
    keep_files(dataset, going, {}, say("dataset.step_delete_masks", count=len(going)))
    return len(going)


def _put(dataset: Dataset, chosen: Mapping[str, Path], what: str) -> None:
    if not chosen:
        return
    going = _going(dataset, chosen)
    (dataset.path / MASKS).mkdir(exist_ok=True)
    coming = {f"{MASKS}/{stem}{file.suffix.lower()}": file for stem, file in chosen.items()}
    keep_files(dataset, going, coming, what)


def _stem_of_picture(stem: str, pictures: Mapping[str, Path]) -> str | None:
    names = [stem, *(stem.removesuffix(ending) for ending in _MASK_ENDINGS if stem.endswith(ending))]
    return next((name for each in names for name in (each, safe_name(each)) if name in pictures), None)


def _why_no_mask(file: Path, image: Path) -> str | None:
    if file.suffix.lower() not in IMAGE_SUFFIXES:
        return say("dataset.no_mask_file")
    reason = why_unreadable(file)
    if reason is not None:
        return reason
    mask, picture = _size(file), _size(image)
    if mask is None or picture is None:
        return say("dataset.mask_unreadable", name=image.name)
    if abs(mask[0] * picture[1] / (mask[1] * picture[0]) - 1) > SAME_SHAPE:
        return say("dataset.mask_shape", mask=f"{mask[0]} x {mask[1]}", picture=f"{picture[0]} x {picture[1]}")
    return None


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height, turned as the camera says; None when that cannot be read."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except DECODE_ERRORS:
        return None


# ---------------------------------------------------------------------------------------------------------- repeats


def read_repeats(folder: Path) -> Repeats:
    """What is set for the folder; nothing where the file is missing or damaged."""
    try:
        stored = json.loads((folder / REPEATS_FILE).read_text(encoding="utf-8"))
        pictures = {str(name): _checked(times) for name, times in dict(stored.get("pictures", {})).items()}
        times = stored.get("folder")
        return Repeats(_checked(times) if times is not None else None, pictures)
    # Numbers without end and brackets without end are damage too.
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, UserError):
        return Repeats()


def set_repeats(dataset: Dataset, items: Sequence[Item], times: object) -> int:
    """Repeat these pictures so many times as often as the others, as one change. Returns for how many it is new.

    Raises `UserError` for what is no whole number from 1 to `MAX_REPEATS`.
    """
    number = _checked(times)
    repeats = read_repeats(dataset.path)
    changed = [item.name for item in items if repeats.of(item.name) != number]
    pictures = {**repeats.pictures, **dict.fromkeys(changed, number)}
    new = replace(repeats, pictures={name: count for name, count in sorted(pictures.items()) if count != 1})
    if changed:
        _write(dataset, new, say("dataset.step_repeats", times=number, count=len(changed)))
    return len(changed)


def set_folder_repeats(dataset: Dataset, times: object) -> bool:
    """How often the whole folder is repeated, as one change; whether that is new. Raises `UserError` as above."""
    number = _checked(times)
    repeats = read_repeats(dataset.path)
    if repeats.folder == number:
        return False
    _write(dataset, replace(repeats, folder=number), say("dataset.step_folder_repeats", times=number))
    return True


def _checked(times: object) -> int:
    number = times if isinstance(times, (int, float)) and not isinstance(times, bool) else 0
    if not 1 <= number <= MAX_REPEATS or number != int(number):
        raise UserError(say("dataset.bad_repeats", most=MAX_REPEATS))
    return int(number)


def _write(dataset: Dataset, repeats: Repeats, what: str) -> None:
    before = None
    if (dataset.path / REPEATS_FILE).is_file():
        before = (dataset.path / REPEATS_FILE).read_text(encoding="utf-8", errors="surrogateescape")
    text = json.dumps({"folder": repeats.folder, "pictures": dict(repeats.pictures)}, ensure_ascii=False, indent=1)
    write_files(dataset, [Written(REPEATS_FILE, before, text)], what)
