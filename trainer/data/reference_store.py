"""sd-scripts' cache files as proof of their own contents: read where they are ours and whole, written on request.

sd-scripts' own files say neither what they were made from nor whether they are whole. Ours have further arrays: one that
says what the file was made from, and for each array that can be read back the key of our entry and its checksum.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

import numpy as np

from trainer.data.ahead import map_ahead
from trainer.data.cache import CacheRequest, TensorCache
from trainer.data.cache_files import Entry, seal, write_whole
from trainer.data.items import Progress
from trainer.data.reference_files import Array, ReferenceFile

T = TypeVar("T")
R = TypeVar("R")

SOURCE: Final = "fluxgui_source"
"""The array that says what a file was made from; only ours have it."""
SEAL: Final = "fluxgui_seal_"
"""In front of an array's name: the array with its key and checksum."""

_READ_ERRORS = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def read_valid(
    files: Sequence[ReferenceFile], missing: Sequence[CacheRequest[T]], cache: TensorCache
) -> list[CacheRequest[T]]:
    """Puts into `cache` what the files provably hold of `missing`, and returns what is missing still."""
    wanted = {request.key: request for request in missing}
    useful = [file for file in files if not wanted.keys().isdisjoint(file.keys.values())]
    for entries in map_ahead(partial(_entries, wanted=frozenset(wanted)), useful):
        for key, entry in entries.items():
            if key in wanted:
                cache.store(wanted.pop(key), entry)
    return list(wanted.values())


@dataclass(frozen=True)
class Written:
    """How many files were written, and how many are not ours and were left as they are."""

    num_files: int
    num_foreign: int


def write_missing(
    files: Sequence[ReferenceFile],
    cache: TensorCache,
    *,
    warn: Callable[[str], None],
    skip_check: bool = False,
    progress: Progress | None = None,
    check_commands: Callable[[], object] | None = None,
) -> Written:
    """Writes the files that are missing or out of date from the entries of `cache`, each whole or not at all.

    What a file of ours holds of the same source at other sizes stays in it. One without our mark, or that cannot be read,
    is never changed. A folder that cannot be written is reported once through `warn`. `skip_check` takes files for whole
    that say that they hold what is needed.
    """
    num_files = num_foreign = 0
    unwritable: set[Path] = set()
    for done, (file, state) in enumerate(
        zip(files, map_ahead(partial(_state, skip_check=skip_check), files), strict=True), start=1
    ):
        if check_commands is not None:
            check_commands()
        folder = file.path.parent
        num_foreign += state == "foreign"
        if state == "wanted" and folder not in unwritable:
            try:
                _write(file, cache)
                num_files += 1
            except OSError as error:
                unwritable.add(folder)
                reason = (error.strerror or str(error)).lower()
                warn(f"{folder} cannot be written ({reason}); cache files for sd-scripts are left out there")
        if progress is not None:
            progress(done, len(files))
    return Written(num_files, num_foreign)


def num_foreign_files(folders: Iterable[Path], ending: str) -> int:
    """How many files with sd-scripts' `ending` lie beside pictures that are not ours.

    Nothing in them says which picture, autoencoder, caption or text encoder they were made from, so they are not read.
    """
    paths = [path for folder in set(folders) for path in folder.glob(f"*{ending}")]
    return sum(source is None for source in map_ahead(_source, paths))


def _write(file: ReferenceFile, cache: TensorCache) -> None:
    entries = {key: cache[key] for key in file.keys.values()}
    arrays = _kept(file) | file.arrays(entries)
    arrays |= {f"{SEAL}{name}": np.array(seal(key, entries[key])) for name, key in file.keys.items()}
    arrays[SOURCE] = np.array(file.source)
    write_whole(file.path, packed(arrays))


def packed(arrays: Mapping[str, Array]) -> bytes:
    """What `numpy.savez` makes of `arrays`, some of whose names could be those of its own parameters."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def _kept(file: ReferenceFile) -> dict[str, Array]:
    """What lies in the file already and is made from the same source."""

    def read(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: arrays[name] for name in arrays} if _text(arrays, SOURCE) == file.source else {}

    return _read(file.path, read) or {}


def _state(file: ReferenceFile, *, skip_check: bool) -> Literal["current", "wanted", "foreign"]:
    if not file.path.exists():
        return "wanted"
    source = _source(file.path)
    if source is None:
        return "foreign"

    def is_current(arrays: Mapping[str, Array]) -> bool:
        if not file.names <= set(arrays):
            return False
        if skip_check:
            return all(_text(arrays, f"{SEAL}{name}").split()[:1] == [key] for name, key in file.keys.items())
        return all(_valid_entry(file, name, key, arrays) is not None for name, key in file.keys.items())

    return "current" if source == file.source and _read(file.path, is_current) else "wanted"


def _entries(file: ReferenceFile, *, wanted: frozenset[str]) -> dict[str, Entry]:
    """The entries of `wanted` that the file provably holds, by their keys."""
    found = {
        key: _read(file.path, partial(_valid_entry, file, name, key))
        for name, key in file.keys.items()
        if key in wanted
    }
    return {key: entry for key, entry in found.items() if entry is not None}


def _valid_entry(file: ReferenceFile, name: str, key: str, arrays: Mapping[str, Array]) -> Entry | None:
    claimed = _text(arrays, f"{SEAL}{name}")
    if claimed.split()[:1] != [key]:
        # Another picture, model or caption: what was made from them need not be read.
        return None
    entry = file.entry(name, arrays)
    return entry if claimed == seal(key, entry) else None


def _source(path: Path) -> str | None:
    """What the file says that it was made from; None when it is not ours, or cannot be read."""
    return _read(path, lambda arrays: _text(arrays, SOURCE))


def _text(arrays: Mapping[str, Array], name: str) -> str:
    return str(arrays[name])


def _read(path: Path, use: Callable[[Mapping[str, Array]], R]) -> R | None:
    """What `use` makes of the arrays, which are read when they are asked for; None for a file that is not whole."""
    try:
        # Not by its name alone, which numpy takes for an array's where the contents look like one.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            return use(cast("Mapping[str, Array]", arrays))
    except _READ_ERRORS:
        return None
