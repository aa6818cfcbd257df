"""The hashes by which LoRA and model files are known to interfaces and model sites; those of kohya-ss/sd-scripts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trainer.train.metadata_facts import ModelFileFacts

_READ_BYTES: Final = 1 << 24
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


def model_file_facts(path: Path) -> ModelFileFacts:
    """Name and quick hash of a model file; the reference's words stand for the hash of a folder or of no file."""
    try:
        return ModelFileFacts(path.name, "IsADirectory" if path.is_dir() else legacy_file_hash(path))
    except OSError:
        return ModelFileFacts(path.name, "NOFILE")


def tensor_hashes(serialised: bytes) -> dict[str, str]:
    """The `sshs_` hashes of a safetensors serialisation that holds the `ss_` keys alone as its metadata.

    `sshs_model_hash` covers the tensor data only and is the same for every metadata; `sshs_legacy_hash` is eight digits
    over 64 KiB from the first MiB on, so that all files below a MiB share one.
    """
    data_start = 8 + int.from_bytes(serialised[:8], "little")
    window = serialised[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(serialised)[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }


def legacy_file_hash(path: Path) -> str:
    """The eight-digit hash of a model file, over 64 KiB from its first MiB on. Quick for any size."""
    with path.open("rb") as file:
        file.seek(_LEGACY_START)
        return hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()[:8]


def file_sha256(path: Path, progress: Callable[[int, int], object]) -> str:
    """SHA-256 of a whole file, in hexadecimal. Reads all of it: `progress(done, total)` gets bytes and may raise."""
    total, done = path.stat().st_size, 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()
