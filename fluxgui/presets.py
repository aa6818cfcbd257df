"""Presets as the form uses them: values by field name. No gradio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fluxgui.models import remembered_models
from trainer.schema.base import UserError
from trainer.schema.presets import Preset, delete_preset, list_presets, load_preset, save_preset
from trainer.schema.settings import read_settings

USUAL_START: Final = "character"


def presets_of_kind(kind: str) -> list[Preset]:
    return [preset for preset in list_presets() if preset.kind == kind]


def start_values() -> dict[str, object]:
    """What the form holds on the first visit: the preset of the settings, and the model files that were used last."""
    try:
        values = preset_form_values(read_settings().start_preset or USUAL_START)
    except UserError:  # the user's preset is gone by now
        values = preset_form_values(USUAL_START)
    return {**values, **remembered_models()}


def preset_form_values(name: str) -> dict[str, object]:
    """A preset's values by field name. Raises `UserError` when it is gone or cannot be used."""
    return dict(load_preset(name).values)


def save_own(name: str, values: Mapping[str, object]) -> str:
    """Keep `values` as the user's preset and give its name. Raises `UserError` for a name that cannot be used."""
    return save_preset(name, values).name


def delete_own(name: str) -> None:
    """Raises `UserError` when it is gone already."""
    delete_preset(name)
