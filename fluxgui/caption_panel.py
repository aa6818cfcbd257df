"""Automatic captions on the Dataset page: start, progress, cancel. The work is done by a job, never in this process."""

from __future__ import annotations

from html import escape
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block

from fluxgui import dataset_view
from fluxgui.caption_jobs import DEFAULT_MODEL, MODES, caption_job, keep_for_undo, start_captions
from fluxgui.dataset_tab import Data, DatasetTab, Updates
from fluxgui.form_parts import PLAIN, html_part
from fluxgui.jobs import JobView, cancel_job
from fluxgui.language import say
from trainer.schema.base import UserError

LOOK_SECONDS: Final = 1.0


def build_caption_panel(parts: dict[str, Block]) -> dict[str, gr.Button]:
    """Lay the panel out; its components go into `parts`, its buttons are given back."""
    modes = {
        "missing": say("dataset.caption_missing"),
        "overwrite": say("dataset.caption_overwrite"),
        "append": say("dataset.caption_append"),
    }
    with gr.Accordion(say("dataset.captions"), open=False, visible=False, elem_id="dataset-captions") as box:
        html_part(f'<p class="empty">{escape(say("dataset.captions_text"))}</p>')
        with gr.Row():
            parts["captioner"] = gr.Textbox(
                DEFAULT_MODEL,
                label=say("dataset.captioner"),
                info=say("dataset.captioner_info"),
                max_lines=1,
                min_width=240,
                html_attributes=PLAIN,
                elem_id="caption-model",
            )
            parts["caption_prompt"] = gr.Textbox(
                label=say("dataset.caption_prompt"),
                info=say("dataset.caption_prompt_info"),
                max_lines=2,
                min_width=240,
                html_attributes=PLAIN,
                elem_id="caption-prompt",
            )
        parts["caption_mode"] = gr.Radio(
            [(modes[mode], mode) for mode in MODES],
            value="missing",
            label=say("dataset.caption_mode"),
            elem_id="caption-mode",
        )
        parts["caption_selected"] = gr.Checkbox(
            label=say("dataset.caption_selected"), info=say("dataset.caption_selected_info"), elem_id="caption-selected"
        )
        with gr.Row():
            start = gr.Button(
                say("dataset.caption_start"), size="sm", min_width=120, variant="primary", elem_id="caption-start"
            )
            cancel = gr.Button(
                say("dataset.caption_cancel"), size="sm", min_width=120, visible=False, elem_id="caption-cancel"
            )
        parts["caption_status"] = html_part(elem_id="caption-status")
    parts["captions_box"] = box
    parts["caption_start"], parts["caption_cancel"] = start, cancel
    parts["caption_timer"] = gr.Timer(LOOK_SECONDS, active=False)
    return {"start": start, "cancel": cancel}


def look(tab: DatasetTab, data: Data) -> Updates:
    """What the newest captioning of the dataset is at; the grid is read anew when it has just ended."""
    dataset = tab.dataset(data)
    view = caption_job(dataset) if dataset is not None else None
    updates: Updates = {}
    if dataset is not None and view is not None and keep_for_undo(dataset, view):
        updates = tab.again(data)
    is_live = view is not None and view.is_live
    parts = tab.parts
    return updates | {
        parts["caption_status"]: status(view) if view is not None else "",
        parts["caption_start"]: gr.update(interactive=not is_live),
        parts["caption_cancel"]: gr.update(visible=is_live),
        parts["caption_timer"]: gr.update(active=is_live),
    }


def start(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    try:
        start_captions(
            dataset,
            model=str(tab.read(data, "captioner") or ""),
            mode=str(tab.read(data, "caption_mode")),
            prompt=str(tab.read(data, "caption_prompt") or ""),
            only=list(tab.read(data, "selected")) if tab.read(data, "caption_selected") else None,
        )
    except (OSError, UserError) as error:
        raise gr.Error(str(error), print_exception=False) from None
    return look(tab, data)


def cancel(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    view = caption_job(dataset) if dataset is not None else None
    if view is not None and view.is_live:
        cancel_job(view.job)
    return look(tab, data)


def status(view: JobView) -> str:
    """The job in words, with its progress while it lasts and what went wrong."""
    if view.is_live:
        text = view.text or say("dataset.caption_starting")
        if view.total:
            text = f"{view.done:.0f} / {view.total:.0f} · {text}"
        width = 100 * view.done / view.total if view.total else 0
        return (
            f'<div class="bar" role="progressbar" aria-label="{escape(text)}" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{width:.0f}"><div style="width:{width:.1f}%"></div></div><p>{escape(text)}</p>'
        )
    count = len(view.results)
    if view.state == "completed":
        heading, kind = say("dataset.captions_done", count=count), "good"
    elif view.state == "cancelled":
        heading, kind = say("dataset.captions_cancelled", count=count), "warn"
    else:
        heading, kind = say("dataset.captions_failed", count=count), "bad"
    lines = [*([view.error] if view.error else []), *view.warnings]
    return dataset_view.lines(kind, heading, lines)


def connect_caption_panel(tab: DatasetTab, buttons: dict[str, gr.Button], **how: Any) -> None:
    timer = tab.parts["caption_timer"]
    assert isinstance(timer, gr.Timer)
    timer.tick(lambda data: look(tab, data), tab.inputs, tab.outputs, trigger_mode="once", **how)
    buttons["start"].click(lambda data: start(tab, data), tab.inputs, tab.outputs, **how)
    buttons["cancel"].click(lambda data: cancel(tab, data), tab.inputs, tab.outputs, **how)
