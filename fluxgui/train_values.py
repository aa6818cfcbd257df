"""What the Train page asks of the form's values beside their check. No gradio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fluxgui import train_view
from fluxgui.form import Reading
from fluxgui.language import say
from fluxgui.pictures import broken_pictures
from trainer.schema.base import Problem, UserError
from trainer.schema.options_data import parse_resolution

NUM_DECODED: Final = 300
"""Pictures that are decoded while the page waits; the trainer looks at all of them."""


def without_broken_pictures(reading: Reading) -> Reading:
    """The reading, with a problem and no job when pictures are broken: the trainer would refuse them a little later.

    They have been decoded when the folder was chosen, so that this takes no time.
    """
    broken = broken_pictures(reading.pictures.images[:NUM_DECODED]) if reading.pictures is not None else []
    if reading.pictures is None or not broken:
        return reading
    names = "; ".join(broken[: train_view.NAMES_SHOWN])
    if len(broken) > train_view.NAMES_SHOWN:
        names += f"; {say('train.and_more', number=len(broken) - train_view.NAMES_SHOWN)}"
    problem = Problem(
        say("train.unusable_pictures", names=names),
        str(reading.pictures.path),
        say("train.unusable_hint"),
        field="image_dir",
    )
    return replace(reading, problems=(*reading.problems, problem), job=None)


def not_larger(preset: Mapping[str, object], resolution: object) -> dict[str, object]:
    """A card's preset without its size where the form's is smaller: what fits stays as quick as it is."""
    try:
        keeps = max(parse_resolution(str(resolution))) < max(parse_resolution(str(preset["resolution"])))
    except (KeyError, ValueError):
        keeps = False
    return {name: value for name, value in preset.items() if not (keeps and name == "resolution")}


def with_options(lines: str, changes: Mapping[str, object]) -> str:
    """The lines of more options with other values; an option that is to be left out (None, False) goes.

    Raises `UserError` when the lines cannot be read.
    """
    try:
        document = tomlkit.parse(lines)
    except TOMLKitError as error:
        raise UserError(say("train.not_toml", reason=error), say("train.more_options")) from None
    for name, value in changes.items():
        tables = [document, *(table for table in document.values() if isinstance(table, dict))]
        holder = cast("dict[str, object]", next((table for table in tables if name in table), document))
        if value is None or value is False:
            holder.pop(name, None)
        elif holder is document and name not in document:
            # Above the first section, as it would belong to the last one else.
            document = tomlkit.parse(tomlkit.dumps({name: value}) + tomlkit.dumps(document))
        else:
            holder[name] = value
    return tomlkit.dumps(document).strip()


def any_given(values: Mapping[str, object], names: Iterable[str]) -> bool:
    return any(str(values[name] or "").strip() for name in names)


def whole_number(value: object) -> int:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else 1


def first_reason(reading: Reading) -> str:
    if reading.problems:
        return reading.problems[0].what
    return say("train.is_missing", what=train_view.missing_text(reading.missing[0]))
