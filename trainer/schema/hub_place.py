"""Where a state lies on the Hugging Face hub, as `--resume` says it together with `--resume_from_huggingface`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPO_TYPES: Final = ("model", "dataset", "space")
_REPO: Final = re.compile(r"[\w.-]+/[\w.-]+")


def is_repo_id(text: str) -> bool:
    """Whether this is `owner/name`."""
    return _REPO.fullmatch(text) is not None


@dataclass(frozen=True)
class HubPlace:
    """A folder in a repository. Without a revision the newest one of the main branch is meant."""

    repo_id: str
    folder: str
    revision: str | None = None
    repo_type: str = "model"


def parse_hub_place(resume: Path) -> HubPlace:
    """Reads `owner/name/path[:revision[:repo_type]]`, the reference's form; a revision may hold slashes.

    Raises `ValueError` with what is wrong.
    """
    place, *more = resume.as_posix().split(":")
    owner, _, rest = place.partition("/")
    name, _, folder = rest.partition("/")
    if not is_repo_id(f"{owner}/{name}") or not folder or ".." in folder.split("/") or len(more) > 2:
        raise ValueError("it must be owner/name/path, owner/name/path:revision or owner/name/path:revision:repo_type")
    repo_type = more[1] if len(more) == 2 else REPO_TYPES[0]
    if repo_type not in REPO_TYPES:
        raise ValueError(f"its repo_type is {repo_type}; it must be {', '.join(REPO_TYPES[:-1])} or {REPO_TYPES[-1]}")
    return HubPlace(f"{owner}/{name}", folder, (more[0] or None) if more else None, repo_type)
