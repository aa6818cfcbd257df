"""Models of the Hugging Face hub that lie in its local cache, found without its library.

The cache's layout is documented by huggingface_hub: `models--<owner>--<name>/` holds `refs/main`, a text with the commit,
and `snapshots/<commit>/` with the files under their own names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILE_ENDINGS: Final = (".safetensors", ".json", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")


def hub_id(path: Path) -> str | None:
    """`owner/name` when `path` is the id of a hub repository rather than a place on this machine.

    A path whose first folder exists here is a path with a typing error, not an id.
    """
    text = path.as_posix()
    if not _HUB_ID.fullmatch(text) or text.endswith(_FILE_ENDINGS):
        return None
    return None if Path(text.partition("/")[0]).exists() or path.exists() else text


def cache_folder() -> Path:
    """The hub's cache as its library would choose it from the environment."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        value = os.environ.get(name)
        if value:
            return Path(value).expanduser() / below
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def cached_snapshot(repo: str) -> Path | None:
    """The folder of the newest fetched version of `repo`, None when there is none on this machine."""
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None
