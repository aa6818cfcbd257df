"""Fetching a model from the Hugging Face hub into its local cache: only the files that the model needs."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trainer.schema.base import UserError
from trainer.schema.hub_cache import cache_folder, hub_id
from trainer.schema.model_kinds import ModelKind, identify
from trainer.schema.weight_files import folder_files, read_weights

_TIMEOUT_SECONDS: Final = 10.0
# The tokenizers that stand beside the encoders in a repository: small, and needed with them.
_TOKENIZER_FOLDERS: Final = {"clip_l": ("tokenizer/",), "t5xxl": ("tokenizer_2/", "tokenizer/")}


def fetch_model(path: Path, kind: ModelKind, field: str, announce: Callable[[str], None]) -> None:
    """Make sure that a hub id's files of this kind are in the cache; does nothing for files and folders.

    What is in the cache is used as it is, without asking the hub for a newer version. `announce` is told before a
    download begins. Raises `UserError`, for the option `field`, when the files are not there and cannot be fetched.
    """
    repo = hub_id(path)
    if repo is None:
        return
    # What is there may also be another model of the same repository.
    with contextlib.suppress(UserError):
        if identify(read_weights(path, kind)) == kind:
            return
    from huggingface_hub import HfApi, constants, snapshot_download  # noqa: PLC0415 - slow to import, for few runs
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    reason = unreachable_reason()
    if reason is not None:
        raise UserError(
            f"the model {repo} is not whole in the local Hugging Face cache and cannot be downloaded ({reason})",
            f"--{field}",
            "Give a file or folder on this machine, or make the hub reachable.",
            field=field,
        )
    try:
        names = HfApi().list_repo_files(repo)
        files = folder_files(names, kind)
        if not files:
            raise UserError(
                f"the hub repository {repo} holds no file that is known as what --{field} takes",
                f"--{field}",
                "Download the file and give its path.",
                field=field,
            )
        for folder in _TOKENIZER_FOLDERS.get(kind, ()):
            tokenizer = [name for name in names if name.startswith(folder)]
            files += tokenizer
            if tokenizer:
                break
        announce(f"downloading {repo} for --{field} ({len(files)} files) into {cache_folder()}")
        snapshot_download(repo, allow_patterns=files, cache_dir=cache_folder())
    except GatedRepoError as error:
        raise UserError(
            f"the hub gives {repo} only to those who have agreed to its licence",
            f"--{field}",
            f"Agree at {constants.ENDPOINT}/{repo}, then set HF_TOKEN or run `hf auth login`.",
            field=field,
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {repo} cannot be downloaded ({first_line(error)})",
            f"--{field}",
            "Check the id and the free space, or give a file or folder on this machine.",
            field=field,
        ) from error


def unreachable_reason() -> str | None:
    """Why the hub cannot be asked, None when it can. One short request: the hub's client tries for minutes."""
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import, for few runs

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "0") not in ("", "0"):
        return "the hub is switched off by HF_HUB_OFFLINE"
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers, whatever it says
    except (OSError, ValueError) as error:
        return f"no connection to {constants.ENDPOINT}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
