"""What lies in cache folders, and what of it may go: entries by their age or until the rest is small enough."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.data.cache_files import CACHE_FOLDER, ENDING, KEY_DIGITS, PART_ENDING

DAY_SECONDS: Final = 86_400
_ENTRY: Final = re.compile(rf"(latents|masks|text)-[0-9a-f]{{{KEY_DIGITS}}}{re.escape(ENDING)}")
_PART: Final = re.compile(rf"(latents|masks|text)-[0-9a-f]{{{KEY_DIGITS}}}\..*{re.escape(PART_ENDING)}")


@dataclass(frozen=True)
class CachedFile:
    """`used_at` is the time of the last use in seconds since 1970; a `part` was left by a killed process."""

    path: Path
    kind: str
    num_bytes: int
    used_at: float
    is_part: bool


def cached_files(roots: Sequence[Path]) -> list[CachedFile]:
    """The files that this program wrote into cache folders at or below `roots`. Links are not followed, and whatever
    else lies there is left out."""
    found: dict[Path, CachedFile] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            if Path(folder).name == CACHE_FOLDER:
                found |= {file.path: file for file in _files_of(Path(folder), names)}
    return list(found.values())


def unused_files(
    files: Sequence[CachedFile], *, now: float, unused_days: float | None = None, max_bytes: int | None = None
) -> list[CachedFile]:
    """Those that were not used for `unused_days`, and of the rest the longest unused ones above `max_bytes`.

    Parts go when they are a day old; a younger one may be being written.
    """
    chosen = [file for file in files if file.is_part and now - file.used_at > DAY_SECONDS]
    entries = sorted((file for file in files if not file.is_part), key=lambda file: (file.used_at, file.path))
    kept_bytes = sum(file.num_bytes for file in entries)
    for file in entries:
        is_old = unused_days is not None and now - file.used_at >= unused_days * DAY_SECONDS
        if is_old or (max_bytes is not None and kept_bytes > max_bytes):
            chosen.append(file)
            kept_bytes -= file.num_bytes
    return chosen


def remove_files(files: Sequence[CachedFile]) -> int:
    """Removes them, and folders that become empty; gives the bytes that were freed. What is gone already is no error."""
    freed = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            file.path.unlink()
            freed += file.num_bytes
    for folder in {file.path.parent for file in files}:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return freed


def _files_of(folder: Path, names: Sequence[str]) -> Iterator[CachedFile]:
    for name in sorted(names):
        match = _ENTRY.fullmatch(name) or _PART.fullmatch(name)
        path = folder / name
        if match is None or path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            stat = path.stat()
            yield CachedFile(path, match[1], stat.st_size, stat.st_mtime, name.endswith(PART_ENDING))
