"""Small WebP pictures for the page, kept on disk: made once for each state of a picture. No gradio."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from fluxgui.pictures import DECODE_ERRORS, MAX_PIXELS
from trainer.schema.folders import data_home
from trainer.schema.run_folder import write_atomic

SIZES: Final = {"small": 256, "large": 1600}
"""Pixels of the longer side."""
MAX_KEPT: Final = 20_000
QUALITY: Final = 75

# A decoded picture may take a few hundred megabytes, and a browser asks for many at once.
_ROOM: Final = threading.BoundedSemaphore(2)


def thumbnail(path: Path, size: str) -> Path | None:
    """The WebP file of a picture in one of `SIZES`; None when it cannot be decoded. Upright, transparency on white."""
    facts = path.stat()
    identity = f"{path.resolve()}|{facts.st_mtime_ns}|{facts.st_size}|{SIZES[size]}"
    name = hashlib.sha256(os.fsencode(identity)).hexdigest()
    folder = data_home() / "cache" / "thumbnails"
    kept = folder / f"{name}.webp"
    if kept.exists():
        return kept
    with _ROOM:
        picture = _shrink(path, SIZES[size])
        if picture is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=QUALITY, method=2)
        write_atomic(kept, stream.getvalue(), durable=False)
    if name.startswith("00"):  # once in a while
        _prune(folder)
    return kept


def _shrink(path: Path, side: int) -> Image.Image | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                image.draft("RGB", (2 * side, 2 * side))
                upright = ImageOps.exif_transpose(image).convert("RGBA")
    except DECODE_ERRORS:
        return None
    upright.thumbnail((side, side))
    shown = Image.new("RGB", upright.size, "white")
    shown.paste(upright, mask=upright.getchannel("A"))
    return shown


def _prune(folder: Path) -> None:
    files = sorted(folder.glob("*.webp"), key=lambda file: file.stat().st_mtime)
    for old in files[: max(0, len(files) - MAX_KEPT)]:
        old.unlink(missing_ok=True)
