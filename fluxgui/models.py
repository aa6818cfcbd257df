"""Model files as the page sees them: what one is, which there are, getting them, and which were used last. No gradio.

Only headers are read.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final

import psutil

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import ModelKind, describe, identify, read_header
from trainer.schema.folders import demo_dir, models_dir
from trainer.schema.model_sources import downloads_dir, is_downloading, read_progress
from trainer.schema.settings import change_settings, is_allowed, read_settings, with_token
from trainer.schema.weight_files import read_weights

KINDS: Final[Mapping[str, ModelKind]] = {
    "pretrained_model_name_or_path": "flux",
    "t5xxl": "t5xxl",
    "clip_l": "clip_l",
    "ae": "autoencoder",
}
MAX_FILES_READ: Final = 200
PROGRAM_FOLDER: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 10.0
CANCEL_SECONDS: Final = 5.0


@dataclass(frozen=True)
class FoundModel:
    """A model file; `field` is the option it can be given as, `text` what it is in words."""

    field: str
    path: Path
    text: str


def recognised(paths: Mapping[str, Path]) -> dict[str, str]:
    """Per field, what the file at its path is, for those files that are what the field asks for."""
    found: dict[str, str] = {}
    for name, path in paths.items():
        try:
            header = read_weights(path, KINDS[name])
        except UserError:
            continue  # the check of the form says what is wrong with it
        if identify(header) == KINDS[name]:
            found[name] = describe(header)
    return found


def found_models(folder: Path) -> dict[str, Path]:
    """Per field, the first fitting file below `folder`, by name."""
    found: dict[str, Path] = {}
    files = sorted(islice(folder.rglob("*.safetensors"), MAX_FILES_READ)) if folder.is_dir() else []
    for path in files:
        try:
            kind = identify(read_header(path))
        except UserError:
            continue
        for name, wanted in KINDS.items():
            if kind == wanted:
                found.setdefault(name, path)
    return found


def list_models() -> list[FoundModel]:
    """The model files in the allowed folders, by what they are and then by name; links that lead out are left out."""
    found: dict[Path, FoundModel] = {}
    for folder in (models_dir(), *read_settings().allowed_dirs, demo_dir() / "models"):
        for path in _files_below(folder):
            if path in found or not is_allowed(path):
                continue
            with contextlib.suppress(OSError):
                model = _look(path, path.stat().st_mtime_ns)
                if model is not None:
                    found[path] = model
    return sorted(found.values(), key=lambda model: (list(KINDS).index(model.field), model.path.name, str(model.path)))


def _files_below(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(islice(folder.rglob("*.safetensors"), MAX_FILES_READ))


@lru_cache(maxsize=1024)
def _look(path: Path, _modified: int) -> FoundModel | None:
    try:
        header = read_header(path)
        kind = identify(header)
        field = next((name for name, wanted in KINDS.items() if wanted == kind), None)
        return FoundModel(field, path, describe(header)) if field is not None else None
    except UserError:
        return None


def remember_models(values: Mapping[str, object]) -> None:
    """Keep the model files of a run that was started for the next new form. The demo's are not kept."""
    paths = {name: str(values[name]) for name in KINDS if values.get(name)}
    if any(Path(path).is_relative_to(demo_dir()) for path in paths.values()):
        return
    with contextlib.suppress(OSError, UserError):  # only a convenience
        if paths and dict(read_settings().model_paths) != paths:
            change_settings(model_paths=paths)


def remembered_models() -> dict[str, str]:
    """The model files that were used last, as far as they are still there, by field."""
    return {name: path for name, path in read_settings().model_paths.items() if name in KINDS and Path(path).exists()}


# ----------------------------------------------------------------------------------------------------------- download


def start_download(flux: str, t5: str) -> None:
    """Download the four files in a process of its own, which outlives this one. Raises `UserError` and `OSError`."""
    if is_downloading():
        raise UserError("a download is under way already", str(downloads_dir()), "Wait for it, or cancel it.")
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    (downloads_dir() / "progress.json").unlink(missing_ok=True)
    with (downloads_dir() / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "get-models", f"--flux={flux}", f"--t5={t5}"],
            cwd=PROGRAM_FOLDER,
            env={**with_token(os.environ), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=flags,
        )
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()
    end = time.monotonic() + START_SECONDS
    while read_progress() is None and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    if read_progress() is None:
        raise UserError("the download did not start", str(downloads_dir() / "log.txt"))


def cancel_download() -> None:
    """End the process that downloads; what has arrived is kept."""
    progress = read_progress()
    if progress is None or progress.state != "running":
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(progress.pid)
        process.terminate()
        process.wait(CANCEL_SECONDS)
