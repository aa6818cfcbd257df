"""Components for the fields of the form, and how a problem is shown at one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final, cast

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui.fields import Field
from fluxgui.language import say

PLAIN: Final = gr.InputHTMLAttributes(autocomplete="off", spellcheck=False)


def html_part(value: str = "", *, elem_id: str | None = None) -> gr.HTML:
    """A part of the page that is written as HTML, with no script of its own."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=None, elem_classes="part")


NOTHING: Final = cast("dict[Any, Any]", gr.skip())
"""What a handler gives that changes nothing. An empty dict is taken for a single value, which fails with more outputs."""


@dataclass(frozen=True)
class Question:
    """Asks once before something is lost. `box` is hidden until then.

    `subject` is what was asked about. The answer is about that, whatever has been chosen on the page since.
    """

    box: gr.Column
    text: gr.HTML
    yes: gr.Button
    no: gr.Button
    subject: gr.State

    @property
    def outputs(self) -> list[Block]:
        """What `ask` updates."""
        return [self.box, self.text, self.subject]

    def ask(self, sentence: str, subject: str) -> dict[Block, Any]:
        """Updates that show the question."""
        return {
            self.box: gr.update(visible=True),
            self.text: f"<p>{escape(sentence)}</p>",
            self.subject: subject,
        }


def build_question(name: str, *, yes: str, no: str) -> Question:
    with gr.Column(visible=False, elem_classes="question", elem_id=f"{name}-question") as box:
        text = html_part()
        with gr.Row():
            agree = gr.Button(yes, variant="stop", size="sm", min_width=80, elem_id=f"{name}-yes")
            leave = gr.Button(no, size="sm", min_width=80, elem_id=f"{name}-no")
    leave.click(lambda: gr.update(visible=False), None, [box], show_progress="hidden")
    return Question(box, text, agree, leave, gr.State(None))


def build_field(field: Field) -> Component:
    """The component of one field, with label, help and the id that links lead to."""
    common: dict[str, Any] = {
        "label": field.label,
        "info": field.help,
        "elem_id": f"field-{field.name}",
        "min_width": 140,
    }
    match field.kind:
        case "flag":
            return gr.Checkbox(value=bool(field.default), **common)
        case "choice":
            choices: list[tuple[str, str]] = [(choice, choice) for choice in field.choices]
            if field.optional:
                choices.insert(0, (say("train.unset"), ""))
            return gr.Dropdown(
                choices,
                value=str(field.default or ""),
                filterable=field.is_open,
                allow_custom_value=field.is_open,
                **common,
            )
        case "integer" | "number":
            # A text box: it can be empty, takes 1e-4, and a slip of the finger on the wheel changes nothing.
            return gr.Textbox(value=shown_number(field.default), max_lines=1, html_attributes=PLAIN, **common)
        case "lines":
            return gr.Textbox(value="", lines=3, max_lines=12, **common)
        case "text" | "path":
            return gr.Textbox(value=str(field.default or ""), max_lines=1, html_attributes=PLAIN, **common)


def build_fields(names: Iterable[str], fields: Mapping[str, Field]) -> dict[str, Component]:
    """Components of `names` in a row that wraps."""
    with gr.Row(elem_classes="fields"):
        return {name: build_field(fields[name]) for name in names}


def shown_number(value: object) -> str:
    """`value` as a person would type it; empty for None."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return "" if value is None else str(value)


def mark(field: Field, text: str) -> dict[str, Any]:
    """The update that shows `text` at a field: "!..." as a problem, "=..." as good news, empty for its help."""
    if not text:
        return gr.update(info=field.help, elem_classes=[])
    if text[0] == "!":
        return gr.update(info=text[1:], elem_classes=["field-bad"])
    return gr.update(info=f"✓ {text[1:]}", elem_classes=["field-good"])


def component_value(field: Field, value: object) -> object:
    """A stored value as its component takes it."""
    match field.kind:
        case "flag":
            return value is True
        case "integer" | "number":
            return shown_number(value)
        case _:
            return "" if value is None else str(value)
