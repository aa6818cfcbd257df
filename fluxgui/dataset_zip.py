"""Datasets as zip files, out and in. No gradio."""

from __future__ import annotations

import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Final

from fluxgui.datasets import Added, Dataset, add_pictures, caption_path
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, IMAGE_SUFFIXES, MAX_FILES, read_folder

ZIP_SUFFIX: Final = ".zip"
MAX_ENTRY_BYTES: Final = 256 * 1024 * 1024
MAX_TOTAL_BYTES: Final = 4 * 1024**3
_UNSAFE_IN_NAME: Final = "/\\:\0"
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,  # a compression that Python does not have
    RuntimeError,  # a password
    EOFError,
    OSError,
)
"""What reading a zip file raises when it is damaged, locked or of an unknown kind."""


def write_zip(dataset: Dataset, target: Path) -> int:
    """Write the dataset's pictures and captions; returns how many files that is. Raises `OSError`."""
    files: list[Path] = []
    for image in read_folder(dataset.path).images:
        files += [image, *([caption_path(image)] if caption_path(image).is_file() else [])]
    files = list(dict.fromkeys(files))
    # Pictures are compressed already.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
    return len(files)


def add_files(dataset: Dataset, files: Sequence[Path]) -> Added:
    """`add_pictures` for files of which some may be zip files; what is in those is taken folder by folder."""
    parts = [add_pictures(dataset, [file for file in files if file.suffix.lower() != ZIP_SUFFIX])]
    for file in files:
        if file.suffix.lower() == ZIP_SUFFIX:
            with tempfile.TemporaryDirectory(prefix="fluxgui-zip-") as folder:
                folders, refused = _unpack(file, Path(folder))
                parts += [Added((), 0, tuple(refused)), *(add_pictures(dataset, inside) for inside in folders)]
    return Added(
        tuple(name for part in parts for name in part.images),
        sum(part.num_captions for part in parts),
        tuple(line for part in parts for line in part.refused),
    )


def _unpack(file: Path, target: Path) -> tuple[list[list[Path]], list[str]]:
    """The pictures and captions of a zip file by folder, and a line for each thing that was left out.

    Names lead nowhere: each folder of the zip becomes a numbered one here. Sizes are held to the limits while unpacking,
    since what a zip file says of itself need not be true.
    """
    refused: list[str] = []
    folders: dict[PurePosixPath, Path] = {}
    found: dict[PurePosixPath, list[Path]] = {}
    left, num_files = MAX_TOTAL_BYTES, 0
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if entry.is_dir() or path.name.startswith(".") or path.parts[0] == "__MACOSX":
                    continue
                if path.suffix.lower() not in (*IMAGE_SUFFIXES, CAPTION_SUFFIX):
                    refused.append(f"{path.name}: {say('dataset.neither')}")
                    continue
                if num_files >= MAX_FILES or left <= 0:
                    refused.append(f"{file.name}: {say('dataset.zip_too_large', most=MAX_FILES)}")
                    break
                name = "".join("_" if sign in _UNSAFE_IN_NAME else sign for sign in path.name)
                folder = folders.setdefault(path.parent, target / str(len(folders)))
                folder.mkdir(exist_ok=True)
                room = min(left, MAX_ENTRY_BYTES)
                with archive.open(entry) as source, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(_Limited(source, room), copy)
                num_bytes = (folder / name).stat().st_size
                if num_bytes > room:
                    (folder / name).unlink()
                    refused.append(f"{path.name}: {say('dataset.zip_too_large', most=MAX_FILES)}")
                    continue
                left -= num_bytes
                num_files += 1
                found.setdefault(path.parent, []).append(folder / name)
    except _UNREADABLE as error:
        refused.append(f"{file.name}: {say('dataset.bad_zip', reason=error)}")
    return list(found.values()), refused


class _Limited:
    """A file of which a little more than `limit` bytes are read, so that too large is told from just fitting."""

    def __init__(self, source: IO[bytes], limit: int) -> None:
        self._source = source
        self._left = limit + 1

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
