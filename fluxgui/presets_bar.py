"""The presets on the Train page: purpose, card, and the user's own."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from fluxgui.form_parts import Question, build_question
from fluxgui.language import say, texts
from fluxgui.presets import presets_of_kind
from trainer.schema.presets import Preset

Choices = list[tuple[str, str]]

NEAR_GB = 0.5
"""By so much a card may have less than it is sold with."""


@dataclass(frozen=True)
class PresetsBar:
    """Components of the presets. The questions come before a preset is deleted or replaced."""

    purpose: gr.Radio
    card: gr.Dropdown
    own: gr.Dropdown
    load: gr.Button
    delete: gr.Button
    name: gr.Textbox
    save: gr.Button
    deleting: Question
    replacing: Question


def build_purpose() -> gr.Radio:
    return gr.Radio(
        choices("purpose"),
        value=None,
        label=say("train.purpose"),
        info=say("train.purpose_help"),
        elem_id="preset-purpose",
    )


def build_card() -> gr.Dropdown:
    return gr.Dropdown(
        choices("vram"),
        value=None,
        label=say("train.card"),
        info=say("train.card_help"),
        filterable=False,
        min_width=140,
        elem_id="preset-vram",
    )


def build_presets_bar(purpose: gr.Radio, card: gr.Dropdown) -> PresetsBar:
    """The user's own presets, in a fold; together with the others, which stand elsewhere, as one."""
    with gr.Accordion(say("train.own_presets"), open=False):
        with gr.Row(equal_height=False):
            own = gr.Dropdown(
                choices("own"),
                value=None,
                label=say("train.saved_preset"),
                info=say("train.saved_preset_help"),
                filterable=False,
                min_width=140,
                elem_id="preset-own",
            )
            name = gr.Textbox(
                label=say("train.save_as"),
                info=say("train.save_as_help"),
                max_lines=1,
                min_width=140,
                elem_id="preset-name",
            )
        with gr.Row():
            load = gr.Button(say("train.load"), size="sm", min_width=80, elem_id="preset-load")
            delete = gr.Button(say("train.delete"), size="sm", min_width=80, elem_id="preset-delete")
            save = gr.Button(say("train.save"), size="sm", min_width=80, elem_id="preset-save")
        deleting = build_question("preset-delete", yes=say("train.delete_it"), no=say("train.keep_it"))
        replacing = build_question("preset-replace", yes=say("train.replace_it"), no=say("train.keep_it"))
    return PresetsBar(purpose, card, own, load, delete, name, save, deleting, replacing)


def choices(kind: str) -> Choices:
    """Title and name of each preset of that kind, as gradio takes them."""
    return [(title_of(preset), preset.name) for preset in presets_of_kind(kind)]


def title_of(preset: Preset) -> str:
    """What the page calls a preset: built-in purposes have a word in each language."""
    known = f"purpose_{preset.name}"
    return say(f"train.{known}") if preset.is_built_in and known in texts("en", "train") else preset.title


def card_preset(gigabytes: float) -> Preset | None:
    """The preset of the largest card that is not larger than this one; None for a card below the smallest."""
    known = [(preset, preset.values.get("vram_gb")) for preset in presets_of_kind("vram")]
    fitting = [
        (float(size), preset)
        for preset, size in known
        if isinstance(size, (int, float)) and size <= gigabytes + NEAR_GB
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None
