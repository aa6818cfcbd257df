"""Datasets: folders of pictures with captions. Those below the datasets folder, and folders that the user added. No gradio.

A dataset has a name, and is only ever found by comparing names: no path comes from the page but the one of a folder that
is added, which must lie below an allowed folder after links are resolved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fluxgui.language import say
from fluxgui.pictures import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    MAX_FILES,
    read_folder,
    safe_name,
    why_no_caption,
    why_unreadable,
)
from trainer.schema.base import UserError
from trainer.schema.folders import data_home, datasets_dir
from trainer.schema.run_folder import write_atomic
from trainer.schema.settings import is_allowed

MASKS: Final = "masks"
"""The folder of masks inside a dataset's folder."""


@dataclass(frozen=True)
class Dataset:
    """A folder under the name that the page and its address use."""

    name: str
    path: Path

    @property
    def key(self) -> str:
        """Names what is kept about the folder elsewhere: the same after a restart, another for each folder."""
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:12]
        return f"{safe_name(self.name)}-{digest}"


@dataclass(frozen=True)
class Item:
    """A picture of a dataset; `caption` is None where there is no caption file."""

    name: str
    caption: str | None

    @property
    def tags(self) -> tuple[str, ...]:
        """The parts of the caption between commas."""
        return tags_of(self.caption or "")


@dataclass(frozen=True)
class Upload:
    """What became of uploaded files: where they are now, and one line for each that was left out."""

    folder: Path
    num_images: int
    num_captions: int
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Added:
    """What became of files that were handed over: the new pictures, and one line for each file that was left out."""

    images: tuple[str, ...]
    num_captions: int
    refused: tuple[str, ...]


def list_datasets() -> list[Dataset]:
    """All datasets by name. Added folders that are gone are left out until they are back."""
    try:
        own = [path for path in datasets_dir().iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        own = []
    found = {path.name: path for path in own if is_allowed(path)}
    for name, path in _added_folders().items():
        if name not in found and path.is_dir() and is_allowed(path):
            found[name] = path
    return [Dataset(name, found[name]) for name in sorted(found, key=str.casefold)]


def find_dataset(name: str | None) -> Dataset | None:
    """The dataset of that name, or None."""
    return next((dataset for dataset in list_datasets() if dataset.name == name), None)


def dataset_of_folder(path: Path) -> Dataset | None:
    """The dataset whose folder this is, or None."""
    resolved = path.resolve()
    return next((dataset for dataset in list_datasets() if dataset.path.resolve() == resolved), None)


def create_dataset(wanted: str) -> Dataset:
    """A new empty dataset. Raises `UserError` when the name is empty or taken."""
    if not wanted.strip():
        raise UserError(say("dataset.no_name"), hint=say("dataset.no_name_hint"))
    name = safe_name(wanted)
    if name in {dataset.name for dataset in list_datasets()}:
        raise UserError(say("dataset.name_taken", name=name), hint=say("dataset.name_taken_hint"))
    path = datasets_dir() / name
    path.mkdir(parents=True)
    return Dataset(name, path)


def add_folder(text: str) -> Dataset:
    """Add the folder at this path as it stands. Raises `UserError` when it is none or lies outside the allowed folders."""
    cleaned = text.strip().strip("\"'").replace("\0", "")
    if not cleaned:
        raise UserError(say("dataset.no_path"))
    path = Path(cleaned).expanduser().absolute()
    # First the question of permission: whether a folder exists elsewhere is nobody's business.
    if not is_allowed(path):
        raise UserError(say("dataset.not_allowed"), str(path), say("dataset.not_allowed_hint"))
    if not path.is_dir():
        raise UserError(say("dataset.no_folder"), str(path), say("dataset.no_folder_hint"))
    known = dataset_of_folder(path)
    if known is not None:
        return known
    taken = {dataset.name for dataset in list_datasets()}
    added = _added_folders()
    name = _free_name(safe_name(path.name), taken | set(added))
    _write_added({**added, name: path})
    return Dataset(name, path)


def remove_folder(dataset: Dataset) -> None:
    """Take an added folder off the list. The folder itself is left as it is."""
    _write_added({name: path for name, path in _added_folders().items() if name != dataset.name})


def is_added(dataset: Dataset) -> bool:
    return dataset.name in _added_folders()


def _added_json() -> Path:
    return data_home() / "dataset-folders.json"


def _added_folders() -> dict[str, Path]:
    try:
        stored = json.loads(_added_json().read_text(encoding="utf-8"))
        return {str(name): Path(str(path)) for name, path in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_added(folders: Mapping[str, Path]) -> None:
    data_home().mkdir(parents=True, exist_ok=True)
    write_atomic(_added_json(), json.dumps({name: str(path) for name, path in folders.items()}, indent=1))


def read_items(dataset: Dataset) -> list[Item]:
    """All pictures by name, each with its caption. Raises `OSError` when the folder cannot be read."""
    folder = read_folder(dataset.path)
    missing = set(folder.without_caption)
    return [Item(path.name, None if path in missing else read_caption(path)) for path in folder.images]


def caption_path(image: Path) -> Path:
    """Where the caption of a picture stands."""
    return image.with_suffix(CAPTION_SUFFIX)


def read_caption(image: Path) -> str | None:
    """The caption as it is shown, or None. What is no UTF-8 in it shows as replacement characters."""
    try:
        return caption_path(image).read_bytes().decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def picture_path(dataset: Dataset, name: str) -> Path | None:
    """The picture of that name in the dataset, or None: never a file of another kind, of another folder or behind a
    link that leads out of the allowed folders."""
    if Path(name).name != name or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    path = dataset.path / name
    return path if path.is_file() and is_allowed(path) else None


def tags_of(caption: str) -> tuple[str, ...]:
    return tuple(tag for part in caption.split(",") if (tag := part.strip()))


def count_tags(items: Iterable[Item]) -> list[tuple[str, int]]:
    """How many captions hold each tag, the most frequent first."""
    counts = Counter(tag for item in items for tag in set(item.tags))
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0].casefold()))


def matching(items: Sequence[Item], *, search: str = "", tag: str = "", only_missing: bool = False) -> list[Item]:
    """The pictures that a search in captions and names, a tag, and the lack of a caption leave over."""
    wanted = search.strip().casefold()
    return [
        item
        for item in items
        if (not wanted or wanted in (item.caption or "").casefold() or wanted in item.name.casefold())
        and (not tag or tag in item.tags)
        and (not only_missing or not item.caption)
    ]


def add_pictures(dataset: Dataset, files: Sequence[Path]) -> Added:
    """Copy pictures and captions into the dataset, each checked and under a safe name that replaces nothing.

    A caption goes with the picture of its name. One without such a picture in the upload belongs to a picture that is
    there already and has no caption. Raises `OSError` when the folder cannot be written.
    """
    taken = {path.stem.casefold() for path in dataset.path.iterdir() if path.is_file()}
    refused: list[str] = []
    images: list[str] = []
    renamed: dict[str, str] = {}
    captions = [file for file in files[:MAX_FILES] if file.suffix.lower() == CAPTION_SUFFIX]
    for file in files[:MAX_FILES]:
        suffix = file.suffix.lower()
        if suffix == CAPTION_SUFFIX:
            continue
        reason = why_unreadable(file) if suffix in IMAGE_SUFFIXES else say("dataset.neither")
        if reason is not None:
            refused.append(f"{file.name}: {reason}")
            continue
        stem = _free_name(safe_name(file.stem), taken)
        taken.add(stem.casefold())
        renamed.setdefault(file.stem, stem)
        copy_whole(file, dataset.path / f"{stem}{suffix}")
        images.append(f"{stem}{suffix}")
    num_captions = 0
    for file in captions:
        target = dataset.path / f"{renamed.get(file.stem, safe_name(file.stem))}{CAPTION_SUFFIX}"
        reason = why_no_caption(file)
        if reason is None and target.exists():
            reason = say("dataset.has_caption")
        if reason is None:
            copy_whole(file, target)
            num_captions += 1
        else:
            refused.append(f"{file.name}: {reason}")
    if len(files) > MAX_FILES:
        refused.append(say("dataset.too_many", more=len(files) - MAX_FILES, most=MAX_FILES))
    return Added(tuple(images), num_captions, tuple(refused))


def take_in(files: Sequence[Path], folder_name: str) -> Upload:
    """Copy uploaded pictures and captions into the datasets folder under `folder_name`, as `add_pictures` does.

    Raises `OSError` when the folder cannot be written.
    """
    name = safe_name(folder_name)
    folder = datasets_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    added = add_pictures(Dataset(name, folder), files)
    return Upload(folder, len(added.images), added.num_captions, added.refused)


def copy_whole(source: Path, target: Path) -> None:
    """Copy so that a half-written file never has the final name."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _free_name(wanted: str, taken: Iterable[str]) -> str:
    used = {name.casefold() for name in taken}
    number, name = 1, wanted
    while name.casefold() in used:
        number += 1
        name = f"{wanted}-{number}"
    return name
