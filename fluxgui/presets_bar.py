"""The row of presets on the Train page: purpose, card, and the user's own."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from fluxgui.form_parts import Question, build_question
from fluxgui.presets import presets_of_kind

Choices = list[tuple[str, str]]


@dataclass(frozen=True)
class PresetsBar:
    """Components of the bar. The questions come before a preset is deleted or replaced."""

    purpose: gr.Dropdown
    card: gr.Dropdown
    own: gr.Dropdown
    load: gr.Button
    delete: gr.Button
    name: gr.Textbox
    save: gr.Button
    deleting: Question
    replacing: Question


def build_presets_bar() -> PresetsBar:
    with gr.Row():
        purpose = gr.Dropdown(
            choices("purpose"),
            value=None,
            label="Purpose",
            info="What is being taught: fills in rank, rate and length.",
            filterable=False,
            min_width=140,
            elem_id="preset-purpose",
        )
        card = gr.Dropdown(
            choices("vram"),
            value=None,
            label="Memory of the card (VRAM)",
            info="Fills in the settings that save memory.",
            filterable=False,
            min_width=140,
            elem_id="preset-vram",
        )
    with gr.Accordion("My presets", open=False):
        with gr.Row(equal_height=False):
            own = gr.Dropdown(
                choices("own"),
                value=None,
                label="Saved preset",
                info="Loading it replaces the settings on this page.",
                filterable=False,
                min_width=140,
                elem_id="preset-own",
            )
            name = gr.Textbox(
                label="Save the present settings as",
                info="Everything on this page except files, pictures and names.",
                max_lines=1,
                min_width=140,
                elem_id="preset-name",
            )
        with gr.Row():
            load = gr.Button("Load", size="sm", min_width=80, elem_id="preset-load")
            delete = gr.Button("Delete", size="sm", min_width=80, elem_id="preset-delete")
            save = gr.Button("Save", size="sm", min_width=80, elem_id="preset-save")
        deleting = build_question("preset-delete", yes="Delete it", no="Keep it")
        replacing = build_question("preset-replace", yes="Replace it", no="Keep it")
    return PresetsBar(purpose, card, own, load, delete, name, save, deleting, replacing)


def choices(kind: str) -> Choices:
    """Title and name of each preset of that kind, as a dropdown takes them."""
    return [(preset.title, preset.name) for preset in presets_of_kind(kind)]
