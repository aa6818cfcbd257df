"""What a state folder says about itself, read without its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from safetensors import SafetensorError, safe_open

from trainer.schema.base import UserError
from trainer.schema.run_folder import RUN_STATE, numbered_entries

FORMAT: Final = 1


STATE_FILE: Final = "state.json"


REFERENCE_FILE: Final = "train_state.json"


PARTS: Final = ("network", "optimizer", "random")


@dataclass(frozen=True)
class StateHead:
    """What `state.json` says, without any tensor. `content` is the whole of it."""

    path: Path
    content: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return int(self.content["position"]["step"])


def is_own_state(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def read_head(path: Path) -> StateHead:
    """Reads and checks a state folder without its tensors. Raises `UserError` for one that cannot be resumed from."""
    try:
        content: object = json.loads((path / STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"{STATE_FILE} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise damaged(path, f"{STATE_FILE} is no object")
    head = cast("dict[str, Any]", content)
    if head.get("format") != FORMAT:
        raise UserError(
            f"this state has format {head.get('format')}; {FORMAT} is known here",
            str(path),
            "It is from another version of this program; resume with that one.",
            field="resume",
        )
    step = head["position"].get("step") if isinstance(head.get("position"), dict) else None
    if not isinstance(step, int) or step < 0:
        raise damaged(path, "it has no position")
    for part in PARTS:
        try:
            with safe_open(path / f"{part}.safetensors", "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise damaged(path, f"{part}.safetensors cannot be read: {error}") from error
    return StateHead(path, head)


def damaged(path: Path, reason: str) -> UserError:
    """The error for a state that cannot be read."""
    return UserError(
        f"the state is damaged: {reason}", str(path), "Resume from an earlier state, if there is one.", field="resume"
    )


def newest_run_state(folder: Path, warn: Callable[[str], None]) -> StateHead | None:
    """The newest good state of those that a run folder keeps by itself; None when there is none."""
    for _, path in reversed(numbered_entries(folder, RUN_STATE)):
        try:
            return read_head(path)
        except UserError as error:
            warn(f"{error} An earlier one is looked for.")
    return None
