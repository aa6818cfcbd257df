"""Model files as the form sees them: what one is, and which lie in the models folder. Headers only. No gradio."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import ModelKind, describe, identify, read_header
from trainer.schema.weight_files import read_weights

KINDS: Final[Mapping[str, ModelKind]] = {
    "pretrained_model_name_or_path": "flux",
    "t5xxl": "t5xxl",
    "clip_l": "clip_l",
    "ae": "autoencoder",
}
MAX_FILES_READ: Final = 200


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
