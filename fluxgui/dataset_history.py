"""Changes to a dataset that can be undone, also after a restart: captions written, pictures moved to the bin. No gradio.

Each change is a file in the data folder, written before anything else is, so that what was interrupted can be undone too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fluxgui.caption_rules import Rule
from fluxgui.datasets import MASKS, Dataset, Item, caption_path, copy_whole, picture_path
from fluxgui.language import say
from fluxgui.pictures import MAX_CAPTION_BYTES, read_folder
from trainer.schema.base import UserError
from trainer.schema.folders import bin_dir, data_home
from trainer.schema.run_folder import write_atomic
from trainer.schema.settings import is_allowed

NUM_KEPT: Final = 100


@dataclass(frozen=True)
class Written:
    """A caption file's text before and after; None stands for no file."""

    file: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Moved:
    """A file of the dataset that went to `target`, an absolute path."""

    file: str
    target: str


@dataclass(frozen=True)
class Came:
    """A file that was copied into the dataset; Undo moves it to `target`, an absolute path in the bin."""

    file: str
    sha256: str
    target: str


@dataclass(frozen=True)
class Step:
    """One change that Undo takes back; `what` says it in words."""

    what: str
    written: tuple[Written, ...] = ()
    moved: tuple[Moved, ...] = ()
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class Undone:
    """What Undo did: the words of the change, how many files it put back, and those it left alone with the reason."""

    what: str
    num_files: int
    left_alone: tuple[str, ...]


def write_captions(dataset: Dataset, captions: Mapping[str, str], what: str) -> int:
    """Write captions by picture name, as one change. Returns how many files differ by it.

    Raises `UserError` when a text is too long or a picture is gone; nothing is written then.
    """
    written: list[Written] = []
    seen: set[str] = set()
    for name, caption in captions.items():
        image = picture_path(dataset, name)
        if image is None:
            raise UserError(say("dataset.picture_gone", name=name))
        text = caption.strip()
        if len(text.encode("utf-8", errors="replace")) > MAX_CAPTION_BYTES:
            raise UserError(say("dataset.caption_too_long", name=name))
        file = caption_path(image)
        before = _read(file)
        # A text without a file and an empty text are the same to the user; pictures of one stem share a file.
        if (before or "").strip() != text and file.name not in seen:
            written.append(Written(file.name, before, text))
            seen.add(file.name)
    write_files(dataset, written, what)
    return len(written)


def write_files(dataset: Dataset, written: Sequence[Written], what: str) -> None:
    """Write small texts, as one change."""
    if not written:
        return
    _record(dataset, Step(what, written=tuple(written)))
    for each in written:
        write_atomic(dataset.path / each.file, _bytes(each.after or ""), durable=len(written) == 1)


def record_written(dataset: Dataset, written: Sequence[Written], what: str) -> None:
    """Take note of captions that another process wrote, so that they can be undone as one change."""
    if written:
        _record(dataset, Step(what, written=tuple(written)))


def change_captions(dataset: Dataset, items: Sequence[Item], rule: Rule, what: str) -> int:
    """Apply a rule to the captions of `items` as one change."""
    changed = {item.name: rule(item.caption or "") for item in items}
    old = {item.name: item.caption or "" for item in items}
    return write_captions(dataset, {name: text for name, text in changed.items() if text != old[name]}, what)


def delete_pictures(dataset: Dataset, names: Sequence[str], what: str) -> int:
    """Move pictures, with captions and masks that no other picture shares, to the bin as one change.

    Raises `UserError` when a file cannot be moved.
    """
    going = [path for name in dict.fromkeys(names) if (path := picture_path(dataset, name)) is not None]
    if not going:
        return 0
    gone = {path.name for path in going}
    needed = {caption_path(path).name for path in read_folder(dataset.path).images if path.name not in gone}
    files = [path.name for path in going]
    files += sorted(
        {
            caption_path(path).name
            for path in going
            if caption_path(path).is_file() and caption_path(path).name not in needed
        }
    )
    stems = {path.stem for path in going} - {Path(name).stem for name in needed}
    if is_allowed(dataset.path / MASKS):
        files += [f"{MASKS}/{mask.name}" for mask in _files_in(dataset.path / MASKS) if mask.stem in stems]
    keep_files(dataset, files, {}, what)
    return len(going)


def keep_files(dataset: Dataset, going: Sequence[str], coming: Mapping[str, Path], what: str) -> None:
    """Move files of the dataset to the bin and copy others in, as one change.

    Both are named as seen from the dataset's folder. Raises `UserError` when a file cannot be moved, and `OSError`.
    """
    if not going and not coming:
        return
    folder = bin_folder(dataset)
    folder.mkdir(parents=True)
    moved = tuple(Moved(name, str(folder / name)) for name in going)
    came = tuple(
        Came(name, hashlib.sha256(file.read_bytes()).hexdigest(), str(folder / "new" / name))
        for name, file in coming.items()
    )
    _record(dataset, Step(what, moved=moved, came=came))
    for each in moved:
        try:
            Path(each.target).parent.mkdir(exist_ok=True)
            shutil.move(dataset.path / each.file, each.target)
        except OSError as error:
            raise UserError(say("dataset.cannot_move", name=each.file, reason=error.strerror or error)) from error
    for name, file in coming.items():
        copy_whole(file, dataset.path / name)


def bin_folder(dataset: Dataset) -> Path:
    """A folder of the bin that does not exist yet, for what leaves the dataset now."""
    folder = _bin(dataset) / time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{folder.name.partition('_')[0]}_{number}")
    return folder


def undo(dataset: Dataset) -> Undone | None:
    """Take back the newest change; None when there is none. Files that have changed since are left alone."""
    entries = _entries(dataset)
    step = _load(entries[-1]) if entries else None
    if step is None:
        return None
    left_alone: list[str] = []
    num_files = 0
    for each in step.written:
        file = dataset.path / each.file
        now = _read(file)
        if now == each.before:
            continue  # it was never written
        if now != each.after:
            left_alone.append(f"{each.file}: {say('dataset.changed_since')}")
        elif each.before is None:
            file.unlink(missing_ok=True)
            num_files += 1
        else:
            write_atomic(file, _bytes(each.before), durable=False)
            num_files += 1
    for each in step.came:
        target, file = Path(each.target), dataset.path / each.file
        if not file.exists():
            continue
        if not is_allowed(file.parent):
            left_alone.append(f"{each.file}: {say('dataset.not_allowed')}")
            continue
        if hashlib.sha256(file.read_bytes()).hexdigest() != each.sha256:
            left_alone.append(f"{each.file}: {say('dataset.changed_since')}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
        num_files += 1
    for each in step.moved:
        target, file = Path(each.target), dataset.path / each.file
        if not is_allowed(file.parent):
            left_alone.append(f"{each.file}: {say('dataset.not_allowed')}")
        elif file.exists():
            if target.exists():
                left_alone.append(f"{each.file}: {say('dataset.name_in_use')}")
        elif target.exists():
            file.parent.mkdir(exist_ok=True)
            shutil.move(target, file)
            num_files += 1
        else:
            left_alone.append(f"{each.file}: {say('dataset.not_in_bin')}")
    entries[-1].unlink(missing_ok=True)
    return Undone(step.what, num_files, tuple(left_alone))


def next_undo(dataset: Dataset) -> str | None:
    """The words of the change that Undo would take back."""
    entries = _entries(dataset)
    step = _load(entries[-1]) if entries else None
    return step.what if step is not None else None


def binned(dataset: Dataset) -> list[str]:
    """The dataset's files in the bin as "time/name", masks as "time/masks/name", the newest first."""
    bin_ = _bin(dataset)
    files = [path for pattern in ("*/*", f"*/{MASKS}/*") for path in bin_.glob(pattern) if path.is_file()]
    return sorted((path.relative_to(bin_).as_posix() for path in files), reverse=True)


def restore(dataset: Dataset, entries: Sequence[str]) -> list[str]:
    """Put files from the bin back. Returns the names of those that stay there, mostly because their name is in use."""
    there = set(binned(dataset))
    kept: list[str] = []
    for entry in entries:
        source = _bin(dataset) / entry
        if entry not in there or not source.exists():
            continue  # a mask may have come back with its picture
        time_folder, _, name = entry.partition("/")
        if not _put_back(dataset, source, name):
            kept.append(name)
            continue
        for mask in _files_in(_bin(dataset) / time_folder / MASKS):
            # It went with its picture, and comes back with it.
            if mask.stem == source.stem:
                _put_back(dataset, mask, f"{MASKS}/{mask.name}")
    return kept


def _put_back(dataset: Dataset, source: Path, name: str) -> bool:
    """Move a file from the bin to where it was; False, and it stays, when its place is taken or may not be written to.

    The place of a mask is taken by any mask of its picture.
    """
    target = dataset.path / name
    others = {path.stem for path in _files_in(target.parent)} if target.parent.name == MASKS else set[str]()
    if target.exists() or source.stem in others or not is_allowed(target.parent):
        return False
    target.parent.mkdir(exist_ok=True)
    shutil.move(source, target)
    return True


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _bin(dataset: Dataset) -> Path:
    return bin_dir() / f"pictures-{dataset.key}"


def _read(file: Path) -> str | None:
    """The file's text such that writing it gives the same bytes, whatever they are."""
    try:
        return file.read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _folder(dataset: Dataset) -> Path:
    return data_home() / "dataset-history" / dataset.key


def _entries(dataset: Dataset) -> list[Path]:
    return sorted(_folder(dataset).glob("*.json"))


def _record(dataset: Dataset, step: Step) -> None:
    entries = _entries(dataset)
    number = int(entries[-1].stem) + 1 if entries else 1
    folder = _folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{number:08d}.json", json.dumps(asdict(step)))
    for old in entries[: max(0, len(entries) + 1 - NUM_KEPT)]:
        old.unlink(missing_ok=True)


def _load(entry: Path) -> Step | None:
    try:
        stored = json.loads(entry.read_text(encoding="utf-8"))
        return Step(
            stored["what"],
            tuple(Written(**each) for each in stored["written"]),
            tuple(Moved(**each) for each in stored["moved"]),
            tuple(Came(**each) for each in stored.get("came", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        entry.unlink(missing_ok=True)  # a damaged entry must not stand before the older ones for ever
        return None
