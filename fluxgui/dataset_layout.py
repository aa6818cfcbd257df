"""Layout of the Dataset page."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui import dataset_view, doctor_view
from fluxgui.caption_panel import build_caption_panel, connect_caption_panel
from fluxgui.dataset_extras_panel import build_extras_panel, connect_extras_panel
from fluxgui.dataset_tab import FIRST_PAGE, FORM_NAMES, DatasetTab
from fluxgui.dataset_wiring import IN_ORDER, connect
from fluxgui.dataset_zip import ZIP_SUFFIX
from fluxgui.form_parts import PLAIN, html_part
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, IMAGE_SUFFIXES, MAX_FILES
from fluxgui.train_tab import TrainTab


def build_dataset_tab(train: TrainTab) -> DatasetTab:
    """Lay the page out and connect it. Call inside a `gr.Tab`. `parts["use"]` is left for the page to connect."""
    parts: dict[str, Block] = {}
    with gr.Column(elem_classes="card", visible=False) as parts["empty"]:
        html_part(f'<div class="card-title"><h2>{say("dataset.empty")}</h2><p>{say("dataset.empty_text")}</p></div>')
    with gr.Column(elem_classes="card"):
        with gr.Row(visible=False, equal_height=True) as parts["chooser"]:
            parts["list"] = gr.Dropdown(
                [], label=say("dataset.dataset"), scale=3, min_width=200, elem_id="dataset-list", filterable=True
            )
            parts["use"] = gr.Button(
                say("dataset.use"), variant="primary", scale=1, min_width=140, elem_id="dataset-use"
            )
        parts["summary"] = html_part(elem_id="dataset-summary")
        with gr.Accordion(say("dataset.adding"), open=False, elem_id="dataset-adding") as parts["adding"]:
            with gr.Row():
                with gr.Column(min_width=240):
                    parts["new_name"] = gr.Textbox(
                        label=say("dataset.new_name"), max_lines=1, html_attributes=PLAIN, elem_id="dataset-new-name"
                    )
                    create = gr.Button(say("dataset.create"), size="sm", elem_id="dataset-create")
                with gr.Column(min_width=240):
                    parts["new_path"] = gr.Textbox(
                        label=say("dataset.new_path"), max_lines=1, html_attributes=PLAIN, elem_id="dataset-new-path"
                    )
                    add = gr.Button(say("dataset.add_folder"), size="sm", elem_id="dataset-add")
            parts["drop"] = gr.File(
                file_count="multiple",
                file_types=[*IMAGE_SUFFIXES, CAPTION_SUFFIX, ZIP_SUFFIX],
                label=say("dataset.drop", most=MAX_FILES),
                height=130,
                elem_id="dataset-drop",
            )
            parts["forget"] = gr.Button(say("dataset.forget"), size="sm", visible=False, elem_id="dataset-forget")
        parts["said"] = html_part(elem_id="dataset-said")
    with gr.Accordion(say("dataset.doctor"), open=False, visible=False, elem_id="dataset-doctor") as parts[
        "doctor_box"
    ]:
        html_part(f'<p class="empty">{say("dataset.doctor_text")}</p>')
        with gr.Row():
            parts["check"] = gr.Button(say("dataset.check"), size="sm", min_width=120, elem_id="doctor-check")
            parts["stop_check"] = gr.Button(
                say("dataset.stop_check"), size="sm", min_width=120, visible=False, elem_id="doctor-stop"
            )
        parts["checking"] = html_part(elem_id="doctor-progress")
        parts["doctor"] = _live_html(doctor_view.SCRIPT, "doctor-report")
        parts["buckets"] = html_part(elem_id="doctor-buckets")
    caption_buttons = build_caption_panel(parts)
    with gr.Row(visible=False, equal_height=False) as parts["whole"]:
        with gr.Column(scale=5, min_width=300):
            with gr.Column(elem_classes="card") as parts["browse"]:
                with gr.Row(equal_height=True):
                    parts["search"] = gr.Textbox(
                        label=say("dataset.search"),
                        max_lines=1,
                        scale=3,
                        min_width=160,
                        html_attributes=PLAIN,
                        elem_id="dataset-search",
                    )
                    parts["only_missing"] = gr.Checkbox(
                        label=say("dataset.only_missing"), scale=1, min_width=190, elem_id="dataset-only-missing"
                    )
                parts["tags"] = _live_html(dataset_view.TAGS_SCRIPT, "dataset-tags")
                parts["grid"] = _live_html(dataset_view.GRID_SCRIPT, "dataset-grid")
                with gr.Row(visible=False, equal_height=True) as parts["pager"]:
                    parts["page_back"] = gr.Button(
                        say("dataset.page_back"), size="sm", min_width=80, elem_id="page-back"
                    )
                    parts["page_text"] = html_part(elem_id="page-text")
                    parts["page_on"] = gr.Button(say("dataset.page_on"), size="sm", min_width=80, elem_id="page-on")
            with gr.Column(elem_classes="card", visible=False, elem_id="picture-large") as parts["large_box"]:
                parts["large"] = html_part(elem_id="picture-stage")
                parts["caption"] = gr.Textbox(
                    label=say("dataset.caption"), info=say("dataset.caption_info"), lines=3, elem_id="picture-caption"
                )
                with gr.Row():
                    small: dict[str, Any] = {"size": "sm", "min_width": 80}
                    parts["previous"] = gr.Button(say("dataset.previous"), elem_id="picture-previous", **small)
                    parts["next"] = gr.Button(say("dataset.next"), elem_id="picture-next", **small)
                    save = gr.Button(say("dataset.save"), variant="primary", elem_id="picture-save", **small)
                    close = gr.Button(say("dataset.close"), elem_id="picture-close", **small)
                    delete_one = gr.Button(say("dataset.delete_one"), variant="stop", elem_id="picture-delete", **small)
        with gr.Column(scale=2, min_width=280), gr.Column(elem_classes="card"):
            html_part(f'<div class="card-title"><h2>{say("dataset.bulk")}</h2></div>')
            parts["target"] = html_part(elem_id="bulk-target")
            with gr.Row():
                select_all = gr.Button(say("dataset.select_all"), size="sm", min_width=80, elem_id="select-all")
                select_none = gr.Button(say("dataset.select_none"), size="sm", min_width=80, elem_id="select-none")
            parts["undo"] = gr.Button(say("dataset.undo"), size="sm", interactive=False, elem_id="dataset-undo")
            parts["text"] = gr.Textbox(
                label=say("dataset.text"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-text"
            )
            with gr.Row():
                trigger = gr.Button(say("dataset.add_trigger"), size="sm", min_width=90, elem_id="bulk-trigger")
                prefix = gr.Button(say("dataset.add_prefix"), size="sm", min_width=90, elem_id="bulk-prefix")
                suffix = gr.Button(say("dataset.add_suffix"), size="sm", min_width=90, elem_id="bulk-suffix")
            parts["find"] = gr.Textbox(
                label=say("dataset.find"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-find"
            )
            parts["replace"] = gr.Textbox(
                label=say("dataset.replace_with"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-replace-with"
            )
            parts["is_regex"] = gr.Checkbox(label=say("dataset.is_regex"), elem_id="bulk-regex")
            parts["preview"] = html_part(elem_id="bulk-preview")
            replace = gr.Button(say("dataset.replace"), size="sm", elem_id="bulk-replace")
            parts["delete"] = gr.Button(
                say("dataset.delete"), size="sm", variant="stop", interactive=False, elem_id="bulk-delete"
            )
            with gr.Accordion(say("dataset.bin"), open=False, elem_id="dataset-bin"):
                parts["bin"] = gr.Dropdown(
                    [], multiselect=True, label=say("dataset.in_bin"), elem_id="dataset-bin-list"
                )
                put_back = gr.Button(say("dataset.restore"), size="sm", elem_id="dataset-restore")
            extras_buttons = build_extras_panel(parts)
    parts["view"] = gr.State(FIRST_PAGE)
    parts["selected"] = gr.State([])
    parts["opened"] = gr.Textbox(visible=False)
    parts["arrived"] = gr.State(False)
    parts["shown"] = gr.State(None)
    tab = DatasetTab(
        parts,
        {
            *(train.form[name] for name in FORM_NAMES),
            *(
                part
                for part in parts.values()
                if isinstance(part, Component) and not isinstance(part, gr.HTML | gr.Button | gr.Timer)
            ),
        },
        train,
    )
    buttons = {
        "create": create, "add": add, "save": save, "close": close, "delete_one": delete_one, "select_all": select_all,
        "select_none": select_none, "trigger": trigger, "prefix": prefix, "suffix": suffix, "replace": replace,
        "put_back": put_back,
    }  # fmt: skip
    connect(tab, buttons)
    connect_caption_panel(tab, caption_buttons, **IN_ORDER)
    connect_extras_panel(tab, extras_buttons, **IN_ORDER)
    return tab


def _live_html(script: str, elem_id: str) -> gr.HTML:
    return gr.HTML("", elem_id=elem_id, js_on_load=script, elem_classes="part")
