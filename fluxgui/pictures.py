"""Folders of pictures with captions: what is in one, and what keeps a file from being taken in. No gradio."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.schema.base import Problem
from trainer.schema.folders import datasets_dir
from trainer.schema.settings import is_allowed

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIX: Final = ".txt"
MAX_FILES: Final = 2000
MAX_PIXELS: Final = 100_000_000
MAX_CAPTION_BYTES: Final = 64 * 1024
THUMBNAIL_PIXELS: Final = 128
DECODE_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged or no pictures."""


@dataclass(frozen=True)
class PictureFolder:
    """What a dataset folder holds: `images` and those of them without a caption file, sorted by name."""

    path: Path
    images: tuple[Path, ...]
    without_caption: tuple[Path, ...]


def read_folder(path: Path) -> PictureFolder:
    """List a dataset folder as the trainer does: only this folder, not those inside. Raises `OSError`."""
    with os.scandir(path) as entries:
        files = sorted(entry.name for entry in entries if entry.is_file())
    names = set(files)
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    missing = [name for name in images if Path(name).with_suffix(CAPTION_SUFFIX).name not in names]
    return PictureFolder(path, tuple(path / name for name in images), tuple(path / name for name in missing))


def check_folder(path: Path) -> PictureFolder | Problem:
    """The folder's content, or what is wrong with it."""
    if not path.is_dir():
        hint = "Give the folder that holds the pictures." if path.exists() else "Check the path for a typing error."
        what = "this is a file, not a folder" if path.exists() else "this folder does not exist"
        return Problem(what, str(path), hint, field="image_dir")
    try:
        folder = read_folder(path)
    except OSError as error:
        return Problem(f"this folder cannot be read ({error.strerror})", str(path), field="image_dir")
    if not folder.images:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        hint = f"Put pictures into it ({kinds}), each with its caption in a text file of the same name."
        return Problem("there is no picture in this folder", str(path), hint, field="image_dir")
    return folder


def broken_pictures(images: Iterable[Path]) -> list[str]:
    """Names of the pictures that cannot be decoded, with the reason."""
    return [f"{path.name}: {reason}" for path in images if (reason := why_unreadable(path)) is not None]


def why_unreadable(path: Path) -> str | None:
    """Decode the whole picture; None when that works, else the reason in a few words."""
    return _why_unreadable(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4096)
def _why_unreadable(path: Path, _modified: int) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large picture is judged by its size below
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return f"has {image.width} x {image.height} pixels, more than can be used"
                image.load()
    except UnidentifiedImageError:  # its text names the whole path
        return "is damaged, or no picture at all"
    except DECODE_ERRORS as error:
        return f"cannot be decoded ({error})"
    return None


def thumbnails(images: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Name and small WebP of each picture that decodes."""
    made = ((path.name, _thumbnail(path, path.stat().st_mtime_ns)) for path in images)
    return [(name, data) for name, data in made if data is not None]


@lru_cache(maxsize=256)
def _thumbnail(path: Path, _modified: int) -> bytes | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except DECODE_ERRORS:
        return None
    upright.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    upright.save(stream, "WEBP", quality=70)
    return stream.getvalue()


def upload_folder_name(current: Path | None, wanted: str) -> str:
    """Where an upload goes: into the chosen folder when it is one of ours, else into a new one named after the run."""
    if current is not None and current.parent == datasets_dir() and is_allowed(current):
        return current.name
    base = safe_name(wanted)
    taken = (datasets_dir() / base).exists()
    return (
        next(f"{base}-{n}" for n in range(2, 10_000) if not (datasets_dir() / f"{base}-{n}").exists())
        if taken
        else base
    )


def why_no_caption(path: Path) -> str | None:
    """What keeps a file from being a caption, in a few words; None when nothing does."""
    if path.stat().st_size > MAX_CAPTION_BYTES:
        return "is too long for a caption"
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    return None


def safe_name(text: str) -> str:
    """`text` as a file name on every system: letters, digits, dot, dash and underscore; never empty or hidden."""
    return re.sub(r"[^\w.-]+", "_", text.strip()).strip("._")[:80] or "pictures"
