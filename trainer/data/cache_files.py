"""The files of a cache: one entry each, named after its key, sealed so that damage shows, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import zlib
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Entry = dict[str, Tensor]

CACHE_FOLDER: Final = ".flux_cache"
"""Folder of the cached files, inside the pictures' folder. It may be deleted at any time."""

KEY_DIGITS: Final = 40
ENDING: Final = ".safetensors"
PART_ENDING: Final = ".part"
"""Of files that are still being written."""

_SEAL: Final = "fluxgui_cache"
"""The file's metadata field."""

_SECONDS_BETWEEN_MARKS: Final = 3600


def entry_path(folder: Path, kind: str, key: str) -> Path:
    """Where the entry lies of a picture in `folder`."""
    return folder / CACHE_FOLDER / f"{kind}-{key}{ENDING}"


def seal(key: str, entry: Entry) -> str:
    """The key and a checksum of everything in the entry. One value, since the order of several is not fixed."""
    value = 0
    for name in sorted(entry):
        tensor = entry[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{key} {value:08x}"


def write_entry(path: Path, key: str, entry: Entry) -> None:
    """Writes the file, and its folder inside an existing one. Raises `OSError`."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, save(entry, metadata={_SEAL: seal(key, entry)}))


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside the file and renames: whoever reads meanwhile sees the old file or the new one, and of several
    writers the last one wins. Not synced: a file that a power cut breaks is found and computed anew."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{PART_ENDING}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_entry(path: Path, key: str) -> Entry | None:
    """The entry with one read of the file, or None when there is none or it is not what was written."""
    try:
        data = path.read_bytes()
        header_bytes = int.from_bytes(data[:8], "little")
        found: str = json.loads(data[8 : 8 + header_bytes])["__metadata__"][_SEAL]
        entry: Entry = load(data)
        return entry if found == seal(key, entry) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def mark_used(path: Path) -> None:
    """Sets the file's time to now, which says when it was last used; not more often than once an hour."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _SECONDS_BETWEEN_MARKS:
            os.utime(path)
