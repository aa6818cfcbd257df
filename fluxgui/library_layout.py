"""Layout of the Library page."""

from __future__ import annotations

from typing import Any, Final

import gradio as gr
from gradio.blocks import Block

from fluxgui import library_view
from fluxgui.form_parts import PLAIN, build_question, html_part
from fluxgui.language import say
from fluxgui.library import ORDERS
from fluxgui.library_extract import build_extract_panel, connect_extract_panel
from fluxgui.library_jobs import FORMS, TOOLS
from fluxgui.library_tab import POLL_SECONDS, QUIETLY, STRENGTHS, USUAL_STRENGTHS, LibraryTab, Updates
from fluxgui.library_wiring import Controls, connect

_FIELDS: Final = {
    "pretrained_model_name_or_path": "FLUX",
    "clip_l": "CLIP-L",
    "t5xxl": "T5",
    "ae": "AE",
    "clip_l_tokenizer": "CLIP-L tokenizer",
    "t5xxl_tokenizer": "T5 tokenizer",
}


def build_library_tab(page: gr.Tab) -> LibraryTab:
    """Lay the page out and connect it. Call inside its `gr.Tab`, `page`, at whose visits the list is read anew."""
    parts: dict[str, Any] = {"chosen": gr.Textbox(visible=False), "timer": gr.Timer(POLL_SECONDS, active=False)}
    with gr.Column(elem_classes="card"):
        html_part(_title("library.title", "library.title_help"))
        with gr.Row(elem_classes="fields"):
            parts["search"] = gr.Textbox(
                label=say("library.search"),
                info=say("library.search_help"),
                max_lines=1,
                html_attributes=PLAIN,
                elem_id="library-search",
            )
            parts["order"] = gr.Dropdown(
                [(say(f"library.order_{order}"), order) for order in ORDERS],
                value=ORDERS[0],
                label=say("library.order"),
                filterable=False,
                elem_id="library-order",
            )
        parts["cards"] = gr.HTML("", elem_id="library-cards", js_on_load=library_view.CARDS_SCRIPT, elem_classes="part")
        parts["undo"] = gr.Button(visible=False, size="sm", elem_id="library-undo")
        with gr.Accordion(say("library.folders"), open=False):
            folder = gr.Textbox(
                label=say("library.add_folder"),
                info=say("library.add_folder_help"),
                max_lines=1,
                html_attributes=PLAIN,
                elem_id="library-folder",
            )
            add = gr.Button(say("library.add"), size="sm", elem_id="library-add")
            parts["folder_list"] = gr.Dropdown(
                [], label=say("library.shown_folder"), visible=False, elem_id="library-folders"
            )
            remove = gr.Button(say("library.remove"), size="sm", elem_id="library-remove")
        extract = build_extract_panel()
    with gr.Column(visible=False, elem_id="library-details") as column:
        parts["details_column"] = column
        with gr.Column(elem_classes="card"):
            parts["details"] = html_part(elem_id="library-facts")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=260):
                    parts["name"] = gr.Textbox(
                        label=say("library.name"), max_lines=1, max_length=100, elem_id="library-name"
                    )
                    renames = gr.Button(say("library.rename"), size="sm", elem_id="library-rename")
                with gr.Column(min_width=260):
                    parts["notes"] = gr.Textbox(
                        label=say("library.notes"), lines=2, max_lines=8, elem_id="library-notes"
                    )
                    keep = gr.Button(say("library.save_notes"), size="sm", elem_id="library-save-notes")
            deletes = gr.Button(say("library.delete"), size="sm", elem_id="library-delete")
            question = build_question("library-delete", yes=say("library.delete_yes"), no=say("library.delete_no"))
            with gr.Accordion(say("library.training"), open=False):
                parts["metadata"] = html_part(elem_id="library-metadata")
        models = _build_try_card(parts)
        tool_inputs = _build_tools_card(parts)
    tab = LibraryTab(parts, models, question)
    connect(
        tab,
        page,
        Controls(folder, add, remove, renames, keep, deletes, tool_inputs),
    )
    connect_extract_panel(tab, extract, page)
    return tab


def _build_try_card(parts: dict[str, Any]) -> dict[str, gr.Textbox]:
    with gr.Column(elem_classes="card"):
        html_part(_title("library.try_title", "library.try_help"))
        parts["prompts"] = gr.Textbox(
            label=say("library.prompts"), info=say("library.prompts_help"), lines=3, max_lines=10, elem_id="try-prompts"
        )
        parts["strengths"] = gr.CheckboxGroup(
            [(value, value) for value in STRENGTHS],
            value=list(USUAL_STRENGTHS),
            label=say("library.strengths"),
            elem_id="try-strengths",
        )
        parts["checkpoints"] = gr.Dropdown(
            [],
            multiselect=True,
            label=say("library.checkpoints"),
            info=say("library.checkpoints_help"),
            elem_id="try-checkpoints",
        )
        with gr.Row(elem_classes="fields"):
            for name, label, info in (
                ("seed", "library.seed", "library.seed_help"),
                ("size", "library.picture_size", None),
                ("steps", "library.num_steps", None),
            ):
                value = {"seed": "42", "size": "512", "steps": "20"}[name]
                parts[name] = gr.Textbox(
                    value=value,
                    label=say(label),
                    info=None if info is None else say(info),
                    max_lines=1,
                    html_attributes=PLAIN,
                    elem_id=f"try-{name}",
                )
        with gr.Accordion(say("library.models"), open=False):
            html_part(f"<p>{say('library.models_help')}</p>")
            models = {
                name: gr.Textbox(label=label, max_lines=1, html_attributes=PLAIN, elem_id=f"try-{name}")
                for name, label in _FIELDS.items()
            }
        with gr.Row():
            parts["make"] = gr.Button(say("library.make"), variant="primary", size="sm", elem_id="try-make")
            parts["cancel"] = gr.Button(say("library.cancel"), size="sm", visible=False, elem_id="try-cancel")
        parts["try_progress"] = html_part(elem_id="try-progress")
        parts["try_grid"] = html_part(elem_id="try-grid")
    return models


def _build_tools_card(parts: dict[str, Any]) -> list[Block]:
    """Returns what `start_tool` takes, in the order in which the handler reads it."""
    with gr.Column(elem_classes="card"):
        html_part(_title("library.tools", "library.tools_help"))
        with gr.Row(elem_classes="fields"):
            tool = gr.Dropdown(
                [(say(f"library.tool_{tool.replace('-', '_')}"), tool) for tool in TOOLS],
                value=TOOLS[0],
                label=say("library.tool"),
                filterable=False,
                elem_id="tool-kind",
            )
            rank = gr.Textbox(
                value="4",
                label=say("library.new_rank"),
                max_lines=1,
                visible=False,
                html_attributes=PLAIN,
                elem_id="tool-rank",
            )
            form = gr.Dropdown(
                list(FORMS),
                value=FORMS[0],
                label=say("library.form"),
                filterable=False,
                visible=False,
                elem_id="tool-form",
            )
            parts["other"] = gr.Dropdown([], label=say("library.other"), visible=False, elem_id="tool-other")
            ratio = gr.Number(1.0, label=say("library.ratio"), visible=False, elem_id="tool-ratio")
            other_ratio = gr.Number(1.0, label=say("library.other_ratio"), visible=False, elem_id="tool-other-ratio")
            name = gr.Textbox(
                label=say("library.new_name"),
                info=say("library.new_name_help"),
                max_lines=1,
                visible=False,
                html_attributes=PLAIN,
                elem_id="tool-name",
            )
        with gr.Row():
            parts["run_tool"] = gr.Button(say("library.run_tool"), variant="primary", size="sm", elem_id="tool-run")
            parts["cancel_tool"] = gr.Button(say("library.cancel"), size="sm", visible=False, elem_id="tool-cancel")
        parts["tool_result"] = html_part(elem_id="tool-result")

    def fields_of(kind: str) -> Updates:
        """Only what the chosen tool reads is shown."""
        shown = {
            rank: kind == "resize",
            form: kind == "convert",
            parts["other"]: kind == "merge-loras",
            ratio: kind in ("merge", "merge-loras"),
            other_ratio: kind == "merge-loras",
            name: kind != "inspect",
        }
        return {part: gr.update(visible=is_shown) for part, is_shown in shown.items()}

    tool.change(fields_of, [tool], [rank, form, parts["other"], ratio, other_ratio, name], **QUIETLY)
    return [tool, rank, form, parts["other"], ratio, other_ratio, name]


def _title(title: str, text: str) -> str:
    return f'<div class="card-title"><h2>{say(title)}</h2><p>{say(text)}</p></div>'
