"""LoRAs on this machine: those of runs, of the library's own folder, and of folders that were added. Headers only. No gradio.

Titles, notes and the added folders are kept in `library.json` in the data folder; everything else is read from the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final, Literal, cast

from fluxgui.pictures import safe_name
from trainer.schema.base import UserError
from trainer.schema.folders import bin_dir, data_home, runs_dir
from trainer.schema.model_kinds import identify
from trainer.schema.run_folder import RunFolder, list_runs, write_atomic
from trainer.schema.run_liveness import is_locked
from trainer.schema.safetensors_header import Header, read_header
from trainer.schema.settings import is_allowed

MAX_FILES: Final = 2000
MAX_NOTES: Final = 20_000
PICTURE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_TURN: Final = threading.Lock()
_RANK_ENDINGS: Final = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    ".down.weight",
)

Order = Literal["newest", "name", "size", "rank"]
ORDERS: Final[tuple[Order, ...]] = ("newest", "name", "size", "rank")


@dataclass(frozen=True)
class Facts:
    """What a LoRA's header says."""

    base: str
    rank: int | None
    alpha: str
    trigger: str
    steps: str
    epoch: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """One LoRA. `entry_id` names its path without telling it. `run` is the run that made it."""

    entry_id: str
    path: Path
    title: str
    facts: Facts
    num_bytes: int
    modified: float
    notes: str
    preview: Path | None
    run: RunFolder | None
    checkpoints: tuple[Path, ...]
    """All LoRAs of the run, oldest first; of a file that no run made, itself."""


def loras_dir() -> Path:
    """Where tools write their results."""
    return data_home() / "loras"


def entry_id_of(path: Path) -> str:
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- listing


def list_entries(search: str = "", order: Order = "newest") -> list[Entry]:
    """One entry for each run (its last LoRA) and for each LoRA elsewhere; those in which every word is found."""
    kept = _read_store()
    entries = [entry for run in list_runs(runs_dir()) if (entry := _entry_of_run(run, kept)) is not None]
    known = {path.resolve() for entry in entries for path in entry.checkpoints}
    for folder in [loras_dir(), *added_folders()]:
        for path in _safetensors_in(folder):
            if path.resolve() in known or not is_allowed(path):
                continue
            known.add(path.resolve())
            entry = _entry(path, kept, None, (path,))
            entries += [] if entry is None else [entry]
    words = search.lower().split()
    found = [entry for entry in entries if all(word in _text_of(entry) for word in words)]
    keys = {
        "newest": lambda entry: -entry.modified,
        "name": lambda entry: entry.title.lower(),
        "size": lambda entry: -entry.num_bytes,
        "rank": lambda entry: -(entry.facts.rank or 0),
    }
    return sorted(found, key=keys[order])


def find_entry(entry_id: str | None) -> Entry | None:
    """The entry of that id, a checkpoint of a run too; an id is only compared with what is there."""
    if not entry_id:
        return None
    kept = _read_store()
    for entry in list_entries():
        if entry.entry_id == entry_id:
            return entry
        for path in entry.checkpoints:
            if entry_id_of(path) == entry_id:
                return _entry(path, kept, entry.run, entry.checkpoints)
    return None


def _entry_of_run(run: RunFolder, kept: _Store) -> Entry | None:
    loras = [path for path in _safetensors_in(run.checkpoints_dir) if _facts_of(path) is not None]
    loras.sort(key=lambda path: path.stat().st_mtime)
    return _entry(loras[-1], kept, run, tuple(loras)) if loras else None


def _entry(path: Path, kept: _Store, run: RunFolder | None, checkpoints: tuple[Path, ...]) -> Entry | None:
    facts = _facts_of(path)
    if facts is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    key = str(path.absolute())
    return Entry(
        entry_id=entry_id_of(path),
        path=path,
        title=kept.titles.get(key) or path.stem,
        facts=facts if run is None else replace(facts, trigger=_trigger_of_run(run) or facts.trigger),
        num_bytes=status.st_size,
        modified=status.st_mtime,
        notes=kept.notes.get(key, ""),
        preview=_picture_beside(path) or (_newest_sample(run) if run is not None else None),
        run=run,
        checkpoints=checkpoints,
    )


def _safetensors_in(folder: Path) -> list[Path]:
    try:
        return sorted(islice(folder.glob("*.safetensors"), MAX_FILES))
    except OSError:
        return []


def _text_of(entry: Entry) -> str:
    facts = entry.facts
    own = (
        entry.title,
        entry.path.name,
        facts.base,
        facts.trigger,
        entry.notes,
        facts.metadata.get("ss_output_name", ""),
    )
    return " ".join(own).lower()


def _facts_of(path: Path) -> Facts | None:
    """None for what is no LoRA or cannot be read."""
    try:
        status = path.stat()
        return _read_facts(path, status.st_mtime_ns, status.st_size)
    except (OSError, UserError):
        return None


@lru_cache(maxsize=4096)
def _read_facts(path: Path, _modified: int, _size: int) -> Facts | None:
    header = read_header(path)
    if identify(header) != "lora" and not any(name.startswith(("lora_unet_", "oft_unet_")) for name in header.tensors):
        return None
    metadata = header.metadata
    base = metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture") or ""
    return Facts(
        base=base or metadata.get("ss_base_model_version", ""),
        rank=_rank(header),
        alpha=metadata.get("ss_network_alpha", ""),
        trigger=metadata.get("modelspec.trigger_phrase") or _common_caption(metadata),
        steps=metadata.get("ss_steps", ""),
        epoch=metadata.get("ss_epoch", ""),
        metadata=metadata,
    )


def _rank(header: Header) -> int | None:
    """The largest rank among the layers."""
    ranks = [info.shape[0] for name, info in header.tensors.items() if name.endswith(_RANK_ENDINGS) and info.shape]
    return max(ranks, default=None)


def _common_caption(metadata: Mapping[str, str]) -> str:
    """The tag that stands in most captions, when the file's tags name one that stands in nearly all."""
    try:
        folders = cast("dict[str, dict[str, int]]", json.loads(metadata.get("ss_tag_frequency", "{}")))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, number in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + number
        total = int(metadata.get("ss_num_train_images", "0"))
        tag, number = max(counts.items(), key=lambda item: item[1])
    except (ValueError, TypeError, AttributeError):
        return ""
    return tag if total and number >= 0.9 * total and len(tag) <= 60 else ""


def _trigger_of_run(run: RunFolder) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = run.dataset_toml.read_text(encoding="utf-8")
        found = re.search(r'^\s*(?:caption_prefix|class_tokens)\s*=\s*"([^"\\]+)"', text, re.MULTILINE)
        return found[1].strip(" ,") if found is not None else ""
    return ""


def _picture_beside(path: Path) -> Path | None:
    names = [f"{path.stem}{middle}{suffix}" for middle in ("", ".preview") for suffix in PICTURE_SUFFIXES]
    return next((picture for name in names if (picture := path.with_name(name)).is_file()), None)


def _newest_sample(run: RunFolder) -> Path | None:
    try:
        pictures = [path for path in run.samples_dir.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
        return max(pictures, key=lambda path: (path.stat().st_mtime, path.name), default=None)
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------- what the user adds


@dataclass(frozen=True)
class _Store:
    folders: tuple[str, ...]
    titles: Mapping[str, str]
    notes: Mapping[str, str]


def added_folders() -> list[Path]:
    return [Path(folder) for folder in _read_store().folders]


def add_folder(text: str) -> Path:
    """Show the LoRAs of this folder from now on. Raises `UserError`."""
    path = Path(text.strip()).expanduser()
    if not text.strip() or not path.is_absolute() or not path.is_dir():
        raise UserError("this is no folder on this machine", text.strip(), "Give the folder's path from its root.")
    if not is_allowed(path):
        raise UserError(
            "this folder is not among the allowed ones", str(path), "Add it under Settings, Folders, and try again."
        )
    with _TURN:
        store = _read_store()
        if str(path) not in store.folders:
            _write_store(replace(store, folders=(*store.folders, str(path))))
    return path


def remove_folder(text: str) -> None:
    """Show its LoRAs no longer; the files stay."""
    with _TURN:
        store = _read_store()
        _write_store(replace(store, folders=tuple(folder for folder in store.folders if folder != text)))


def save_notes(entry: Entry, text: str) -> None:
    with _TURN:
        store = _read_store()
        _write_store(replace(store, notes={**store.notes, str(entry.path.absolute()): text[:MAX_NOTES]}))


def rename(entry: Entry, title: str) -> Path:
    """Give the LoRA another name and return where it lies now. Raises `UserError`.

    A file that no run made is renamed, with the picture beside it. A run knows its files by name, so that those keep
    theirs, and are shown and downloaded under the new one.
    """
    title = title.strip().removesuffix(".safetensors").strip()
    if not title:
        raise UserError("the name is empty", entry.path.name)
    target = entry.path
    if entry.run is None:
        target = entry.path.with_name(f"{safe_name(title)}.safetensors")
        if target != entry.path:
            if target.exists():
                raise UserError("there is a file of this name already", target.name, "Choose another name.")
            _moved([(entry.path, target), *_companions(entry.path, target)])
    with _TURN:
        store = _read_store()
        old, new = str(entry.path.absolute()), str(target.absolute())
        titles = {key: value for key, value in store.titles.items() if key != old} | {new: title}
        notes = {new if key == old else key: value for key, value in store.notes.items()}
        _write_store(replace(store, titles=titles, notes=notes))
    return target


def _companions(path: Path, target: Path) -> list[tuple[Path, Path]]:
    picture = _picture_beside(path)
    return [] if picture is None else [(picture, target.with_name(target.stem + picture.name[len(path.stem) :]))]


def _moved(pairs: Sequence[tuple[Path, Path]]) -> None:
    try:
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)
    except OSError as error:
        raise UserError(f"the file cannot be moved: {error.strerror or error}", str(pairs[0][0])) from error


# ------------------------------------------------------------------------------------------------------------------ bin


def delete(entry: Entry) -> str:
    """Move the LoRA and the picture beside it into the bin; returns the name by which `restore` finds it there."""
    if entry.run is not None and is_locked(entry.run):
        raise UserError("this run is at work", entry.run.path.name, "Stop it first.")
    name = f"lora-{time.strftime('%Y%m%d-%H%M%S')}-{entry.entry_id}"
    folder = bin_dir() / name
    picture = _picture_beside(entry.path)
    files = [entry.path, *([picture] if picture is not None else [])]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "origin.json", json.dumps({file.name: str(file.absolute()) for file in files}, indent=1))
    _moved([(file, folder / file.name) for file in files])
    return name


def restore(name: str) -> Path:
    """Put a deleted LoRA back where it was; returns its path. Raises `UserError`."""
    folder = next((path for path in bin_dir().glob("lora-*") if path.name == name), None)
    if folder is None:
        raise UserError("this is not in the bin any more", name)
    origins = cast("dict[str, str]", json.loads((folder / "origin.json").read_text(encoding="utf-8")))
    taken = next((target for target in origins.values() if Path(target).exists()), None)
    if taken is not None:
        raise UserError("there is another file in its place now", taken, "Rename that one first.")
    _moved([(folder / file, Path(target)) for file, target in origins.items() if (folder / file).exists()])
    shutil.rmtree(folder, ignore_errors=True)
    return Path(next(iter(origins.values())))


# ---------------------------------------------------------------------------------------------------------------- store


def _store_path() -> Path:
    return data_home() / "library.json"


def _read_store() -> _Store:
    try:
        parsed: object = json.loads(_store_path().read_bytes())
    except (OSError, ValueError):
        parsed = {}
    values = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
    folders = values.get("folders")
    listed = cast("list[object]", folders) if isinstance(folders, list) else []
    return _Store(
        tuple(entry for entry in listed if isinstance(entry, str)),
        _texts(values.get("titles")),
        _texts(values.get("notes")),
    )


def _texts(value: object) -> dict[str, str]:
    entries = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    return {key: text for key, text in entries.items() if isinstance(text, str)}


def _write_store(store: _Store) -> None:
    values = {"folders": list(store.folders), "titles": store.titles, "notes": store.notes}
    _store_path().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_store_path(), json.dumps(values, ensure_ascii=False, indent=1))
