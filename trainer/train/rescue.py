"""Keeps the work of a run whose output folder has vanished or is full when the LoRA is to be saved for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.schema.base import UserError


def save_or_rescue(save_into: Callable[[Path], None], folder: Path, elsewhere: Sequence[Path]) -> None:
    """Saves into `folder`, else into the first of `elsewhere` that takes it.

    Raises the first `UserError` when `folder` refuses, with the place that took the file if one did.
    """
    try:
        save_into(folder)
        return
    except UserError as error:
        failure = error
    for place in elsewhere:
        try:
            save_into(place)
        except UserError:
            continue
        problem = failure.problems[0]
        raise UserError(
            problem.what,
            problem.where,
            f"The LoRA was saved into {place} instead; move it from there.",
            field=problem.field,
            exit_code=failure.exit_code,
        ) from failure
    raise failure
