"""Where the four model files come from, and the folder in which a download tells how far it is.

    downloads/
      request.json                      written by whoever asks
      lock  progress.json  log.txt      written by the process that downloads

As with runs, the folder is all that page and process share: closing the page changes nothing about a download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, cast

from filelock import FileLock, Timeout

from trainer.schema.folders import data_home
from trainer.schema.model_kinds import ModelKind

State = Literal["running", "completed", "cancelled", "interrupted", "failed"]
FLUX_CHOICES: Final = ("dev", "schnell")
T5_CHOICES: Final = ("fp16", "fp8")


@dataclass(frozen=True)
class ModelFile:
    """A file of a hub repository. `field` is the option it is for, `num_bytes` about what it has."""

    field: str
    kind: ModelKind
    repo_id: str
    name: str
    num_bytes: int
    is_gated: bool


_TEXT: Final = "comfyanonymous/flux_text_encoders"


def needed_files(flux: str, t5: str) -> list[ModelFile]:
    """The four files for `flux` of `FLUX_CHOICES` and `t5` of `T5_CHOICES`. Raises `ValueError` for another choice."""
    if flux not in FLUX_CHOICES or t5 not in T5_CHOICES:
        raise ValueError(f"there is no FLUX.1 {flux} with T5 in {t5}")
    repo = f"black-forest-labs/FLUX.1-{flux}"
    t5_name, t5_bytes = {
        "fp16": ("t5xxl_fp16.safetensors", 9_787_841_024),
        "fp8": ("t5xxl_fp8_e4m3fn.safetensors", 4_893_934_904),
    }[t5]
    return [
        ModelFile("ae", "autoencoder", repo, "ae.safetensors", 335_304_388, True),
        ModelFile("clip_l", "clip_l", _TEXT, "clip_l.safetensors", 246_144_152, False),
        ModelFile("t5xxl", "t5xxl", _TEXT, t5_name, t5_bytes, False),
        ModelFile("pretrained_model_name_or_path", "flux", repo, f"flux1-{flux}.safetensors", 23_802_932_552, True),
    ]


@dataclass(frozen=True)
class FileProgress:
    """One file of a download; `total` is 0 until it is known."""

    field: str
    name: str
    done: int = 0
    total: int = 0
    path: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a download is. `message` and `hint` say what went wrong and what to do."""

    state: State
    files: tuple[FileProgress, ...] = ()
    message: str = ""
    hint: str = ""
    pid: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def downloads_dir() -> Path:
    return data_home() / "downloads"


def download_lock() -> FileLock:
    """Held by the process that downloads, for as long as it lives."""
    downloads_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(str(downloads_dir() / "lock"))


def read_progress() -> Progress | None:
    """The newest download, None when there was none. One that ended without a word is "interrupted"."""
    try:
        found = cast("Mapping[str, object]", json.loads((downloads_dir() / "progress.json").read_bytes()))
        files = tuple(FileProgress(**entry) for entry in cast("list[dict[str, str | int]]", found["files"]))  # pyright: ignore[reportArgumentType]
        progress = Progress(
            cast("State", found["state"]), files, str(found["message"]), str(found["hint"]), int(str(found["pid"]))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if progress.state == "running" and not is_downloading():
        return Progress("interrupted", progress.files, progress.message, progress.hint)
    return progress


def is_downloading() -> bool:
    lock = download_lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
